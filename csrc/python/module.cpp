// lcore._runtime: the host data structures of csrc/runtime for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <utility>

#include "runtime/page_allocator.h"

namespace nb = nanobind;
using lcore::runtime::OutOfPages;
using lcore::runtime::PageAllocator;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewIds = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

namespace {

std::span<const int32_t> span_of(const Ids& ids) { return {ids.data(), ids.shape(0)}; }

// Hands a vector's memory to NumPy without a copy.
NewIds to_numpy(std::vector<int32_t>&& values) {
  auto* owned = new std::vector<int32_t>(std::move(values));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  return NewIds(owned->data(), {owned->size()}, owner);
}

}  // namespace

NB_MODULE(_runtime, m) {
  nb::exception<OutOfPages>(m, "OutOfPages", PyExc_MemoryError);
  nb::class_<PageAllocator>(m, "PageAllocator", "Free pages and reference counts of a pool; one mutex a call.")
      .def(nb::init<int64_t>(), nb::arg("num_pages"))
      .def(
          "allocate", [](PageAllocator& self, int64_t count) { return to_numpy(self.allocate(count)); },
          nb::arg("count"), "The lowest free ids, int32, each with one reference; OutOfPages when there are fewer.")
      .def(
          "retain", [](PageAllocator& self, const Ids& ids) { self.retain(span_of(ids)); }, nb::arg("ids").noconvert(),
          "One reference more for each id.")
      .def(
          "release", [](PageAllocator& self, const Ids& ids) { return self.release(span_of(ids)); },
          nb::arg("ids").noconvert(), "One reference less for each id; returns how many pages became free.")
      .def("grow", &PageAllocator::grow, nb::arg("num_pages"), "Adds pages up to this total.")
      .def(
          "packed", [](const PageAllocator& self) { return to_numpy(self.packed()); },
          "The id that pack() gives to each page, int32; -1 for a free one.")
      .def("pack", &PageAllocator::pack, "Moves the highest pages in use to the lowest free ids and drops free pages.")
      .def("refcount", &PageAllocator::refcount, nb::arg("id"), "How many hold the page; 0 when it is free.")
      .def(
          "refcounts", [](const PageAllocator& self, const Ids& ids) { return to_numpy(self.refcounts(span_of(ids))); },
          nb::arg("ids").noconvert(), "How many hold each of these pages in use, int32.")
      .def_prop_ro("num_pages", &PageAllocator::num_pages)
      .def_prop_ro("free_count", &PageAllocator::free_count);
}
