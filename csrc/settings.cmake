# How all of lcore's C++ is compiled: for the op library and for the standalone benchmarks.
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH LCORE_ROOT)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
# Contraction makes a*b+c one FMA in ISO mode too; without errno and traps the vector loops stay loops.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra> $<$<COMPILE_LANGUAGE:CXX>:-Wno-psabi>
                    $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=fast> $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno>
                    $<$<COMPILE_LANGUAGE:CXX>:-fno-trapping-math> $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${LCORE_ROOT}/=>)
set(KERNEL_OPTIMIZATION -O3 CACHE STRING "of the CPU kernels")
if(LCORE_SANITIZE)
  # The first finding ends the process: a report that scrolls by is a report that nobody reads.
  set(SANITIZERS -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${SANITIZERS};-g1;-fno-omit-frame-pointer>")
  add_link_options(${SANITIZERS})
  set(KERNEL_OPTIMIZATION -O2)
endif()
include_directories(${CMAKE_CURRENT_LIST_DIR})
