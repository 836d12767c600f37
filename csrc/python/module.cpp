// lcore._runtime: the host data structures of csrc/runtime for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <exception>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "runtime/ngram_index.h"
#include "runtime/page_allocator.h"
#include "runtime/page_file.h"
#include "runtime/prefix_index.h"

namespace nb = nanobind;
using lcore::runtime::Mapping;
using lcore::runtime::NgramIndex;
using lcore::runtime::OutOfPages;
using lcore::runtime::PageAllocator;
using lcore::runtime::PageFile;
using lcore::runtime::PrefixIndex;
using lcore::runtime::Rows;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Memory = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;
using NewIds = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;
using NewMatrix = nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>;

namespace {

std::span<const int32_t> span_of(const Ids& ids) { return {ids.data(), ids.shape(0)}; }

Rows rows_of(const Matrix& m) { return {m.data(), static_cast<int64_t>(m.shape(0)), static_cast<int64_t>(m.shape(1))}; }

std::string string_of(const nb::bytes& name) { return {name.c_str(), name.size()}; }

// Hands a vector's memory to NumPy without a copy.
template <class Array>
Array to_numpy(std::vector<int32_t>&& values, std::initializer_list<size_t> shape) {
  auto* owned = new std::vector<int32_t>(std::move(values));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  return Array(owned->data(), shape, owner);
}

NewIds to_numpy(std::vector<int32_t>&& values) {
  const size_t size = values.size();
  return to_numpy<NewIds>(std::move(values), {size});
}

#ifdef __linux__
void bind_page_file(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });
  const nb::call_guard<nb::gil_scoped_release> no_gil;
  nb::class_<PageFile>(m, "PageFile", "Pages in a mapped file, those used last in memory; one mutex a call.")
      .def(nb::init<int, int64_t>(), nb::arg("descriptor"), nb::arg("page_bytes"))
      .def(
          "map",
          [](PageFile& self, int64_t num_pages) {
            auto* held = new std::shared_ptr<Mapping>(self.map(num_pages));
            const nb::capsule owner(held, [](void* p) noexcept { delete static_cast<std::shared_ptr<Mapping>*>(p); });
            const size_t pages = num_pages, bytes = self.page_bytes();
            return Memory((*held)->data(), {pages, bytes}, owner);
          },
          nb::arg("num_pages"),
          "Memory of the first pages, (num_pages, page_bytes) uint8; what was mapped before stays.")
      .def(
          "back", [](PageFile& self, const Ids& ids) { self.back(span_of(ids)); }, nb::arg("ids").noconvert(), no_gil,
          "Disk space under pages; OSError, and none for any of them, when there is too little.")
      .def(
          "discard", [](PageFile& self, const Ids& ids) { self.discard(span_of(ids)); }, nb::arg("ids").noconvert(),
          no_gil, "Gives the disk space and the memory of pages back.")
      .def(
          "touch",
          [](PageFile& self, const Ids& ids, const Ids& ahead, int64_t most_bytes, bool writes) {
            return self.touch(span_of(ids), span_of(ahead), most_bytes, writes);
          },
          nb::arg("ids").noconvert(), nb::arg("ahead").noconvert(), nb::arg("most_bytes"), nb::arg("writes"), no_gil,
          "Brings pages into memory and begins to read those of `ahead`; drops others, the longest unused first, "
          "beyond "
          "most_bytes; returns `drops`.")
      .def(
          "recount", [](PageFile& self, const Ids& ids, int64_t most_bytes) { self.recount(span_of(ids), most_bytes); },
          nb::arg("ids").noconvert(), nb::arg("most_bytes"), no_gil,
          "Counts pages as in memory that were dropped while they were read, and drops what exceeds most_bytes.")
      .def("__contains__", &PageFile::contains, nb::arg("id"), no_gil,
           "Whether a page is in memory, by this object's account.")
      .def_prop_ro("page_bytes", &PageFile::page_bytes)
      .def_prop_ro("drops", &PageFile::drops, no_gil)
      .def_prop_ro("resident_bytes", &PageFile::resident_bytes, no_gil)
      .def_prop_ro("file_bytes", &PageFile::file_bytes)
      .def_prop_ro("in_memory", &PageFile::in_memory);
}
#endif

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
      .def(
          "held_once", [](const PageAllocator& self, const Ids& ids) { return self.held_once(span_of(ids)); },
          nb::arg("ids").noconvert(), "Whether each of these pages has one reference.")
      .def_prop_ro("num_pages", &PageAllocator::num_pages)
      .def_prop_ro("free_count", &PageAllocator::free_count);
#ifdef __linux__
  bind_page_file(m);
#endif
  nb::class_<PrefixIndex>(m, "PrefixIndex",
                          "Pages of the beginnings of texts, by namespace and token ids; one mutex a call.",
                          nb::is_weak_referenceable())
      .def(nb::init<int>(), nb::arg("hash_bits") = 64)
      .def(
          "match",
          [](PrefixIndex& self, const nb::bytes& name, const Matrix& tokens) {
            PrefixIndex::Match found = self.match(string_of(name), rows_of(tokens));
            const size_t runs = found.runs, width = found.width;
            return to_numpy<NewMatrix>(std::move(found.pages), {runs, width});
          },
          nb::arg("namespace"), nb::arg("tokens").noconvert(),
          "Pages (matched runs, width), int32, of the longest known beginning of tokens (runs, page_size); -1 behind "
          "those of a run that has fewer.")
      .def(
          "insert",
          [](PrefixIndex& self, const nb::bytes& name, const Matrix& tokens, const Matrix& pages) {
            return self.insert(string_of(name), rows_of(tokens), rows_of(pages));
          },
          nb::arg("namespace"), nb::arg("tokens").noconvert(), nb::arg("pages").noconvert(),
          "Adds what is not known of tokens (runs, page_size) with pages (runs, width), -1 for none; returns how many "
          "runs were.")
      .def(
          "evict",
          [](PrefixIndex& self, int64_t count, const PageAllocator* allocator) {
            return to_numpy(self.evict(count, allocator));
          },
          nb::arg("count"), nb::arg("allocator") = nb::none(),
          "Takes leaves away, the longest unused first, until they had `count` pages; returns the pages.")
      .def(
          "clear",
          [](PrefixIndex& self, const std::optional<nb::bytes>& name) {
            return to_numpy(name ? self.clear(string_of(*name)) : self.clear());
          },
          nb::arg("namespace") = nb::none(), "Takes a namespace away, or all; returns the pages.")
      .def(
          "renumber", [](PrefixIndex& self, const Ids& ids) { self.renumber(span_of(ids)); },
          nb::arg("ids").noconvert(), "Pages have moved: page i is now ids[i].")
      .def_prop_ro("nodes", [](const PrefixIndex& self) { return self.stats().nodes; })
      .def_prop_ro("pages", [](const PrefixIndex& self) { return self.stats().pages; })
      .def_prop_ro("hits", [](const PrefixIndex& self) { return self.stats().hits; })
      .def_prop_ro("misses", [](const PrefixIndex& self) { return self.stats().misses; })
      .def_prop_ro("evictions", [](const PrefixIndex& self) { return self.stats().evictions; });
  nb::class_<NgramIndex>(m, "NgramIndex", "Where the last tokens of a sequence have occurred before in it.")
      .def(nb::init<int64_t, int64_t>(), nb::arg("n_min"), nb::arg("n_max"))
      .def(
          "extend", [](NgramIndex& self, const Tokens& tokens) { self.extend({tokens.data(), tokens.shape(0)}); },
          nb::arg("tokens").noconvert(), "Adds int64 tokens at the end.")
      .def("truncate", &NgramIndex::truncate, nb::arg("size"), "Keeps the first tokens, as if no more had come.")
      .def(
          "match",
          [](const NgramIndex& self) {
            const NgramIndex::Match found = self.match();
            return nb::make_tuple(found.length, found.end);
          },
          "(n, position where it ends) of the latest earlier n-gram equal to the last n tokens; (0, -1) without one.")
      .def("propose", &NgramIndex::propose, nb::arg("count"), "The tokens that followed the match; [] without one.")
      .def("__len__", &NgramIndex::size);
}
