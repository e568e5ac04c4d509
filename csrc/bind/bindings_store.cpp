// Segments, prefetching and buffers for Python: checks of arguments, conversions, nothing else.
// Python sees them as python/crosscoder/_core.pyi declares them.

#include "bind/bindings_store.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind/bindings.hpp"
#include "store/buffer_pool.hpp"
#include "core/cpu_features.hpp"
#include "store/prefetcher.hpp"
#include "store/segment.hpp"
#include "store/unpack.hpp"

namespace py = pybind11;

namespace crosscoder {
namespace {

using arrays::kAny;
using arrays::require;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

const std::vector<std::string>& item_names() {
    static const std::vector<std::string> names = {"fp32", "bf16", "fp16", "int8", "int32", "int4"};
    return names;
}

Item parse_item(const std::string& name) {
    for (std::size_t i = 0; i < item_names().size(); ++i) {
        if (item_names()[i] == name) {
            return static_cast<Item>(i);
        }
    }
    throw py::value_error("dtype must be one of fp32, bf16, fp16, int8, int4, not " + name);
}

SegmentHead head_of(std::uint64_t store, std::uint32_t shard, std::uint64_t rows, py::ssize_t width) {
    if (rows < 1 || width < 1 || width > 1 << 22) {
        throw py::value_error("a segment needs rows, and a width of 1 to 4194304");
    }
    SegmentHead head;
    head.store = store;
    head.shard = shard;
    head.rows = rows;
    head.width = static_cast<std::uint32_t>(width);
    return head;
}

bool bind_write_activations(const std::string& path, const std::string& temporary, const py::object& array,
                            const std::string& dtype, std::uint32_t group, std::uint64_t store, std::uint32_t shard,
                            const std::string& name) {
    const py::array x = require<float>(array, "x", {kAny, kAny});
    SegmentHead head = head_of(store, shard, static_cast<std::uint64_t>(x.shape(0)), x.shape(1));
    head.item = parse_item(dtype);
    if (head.item == Item::int32 || head.quantised() != (group > 0)) {
        throw py::value_error("int8 and int4, and no other dtype, need a group of channels");
    }
    if (head.item == Item::int4 && group % 2 != 0 && group < head.width) {
        throw py::value_error("int4 needs an even group of channels, or one group");
    }
    head.group = group;
    head.name = name;
    const auto* values = static_cast<const float*>(x.data());
    const py::gil_scoped_release release;
    return write_activations(path, temporary, std::move(head), values);
}

void bind_write_tokens(const std::string& path, const std::string& temporary, const py::object& array,
                       std::uint64_t store, std::uint32_t shard) {
    const py::array rows = require<std::int32_t>(array, "rows", {kAny, kAny});
    SegmentHead head = head_of(store, shard, static_cast<std::uint64_t>(rows.shape(0)), rows.shape(1));
    head.kind = Kind::tokens;
    head.item = Item::int32;
    const auto* values = static_cast<const std::int32_t*>(rows.data());
    const py::gil_scoped_release release;
    write_tokens(path, temporary, std::move(head), values);
}

py::dict head_as_dict(const SegmentHead& head) {
    py::dict result;
    result["kind"] = head.kind == Kind::tokens ? "tokens" : "activations";
    result["dtype"] = item_names()[static_cast<std::size_t>(head.item)];
    result["shard"] = head.shard;
    result["width"] = head.width;
    result["rows"] = head.rows;
    result["rows_per_block"] = head.rows_per_block;
    result["group"] = head.group;
    result["store"] = head.store;
    result["norm_sum"] = head.norm_sum;
    result["name"] = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(head.name.data(), static_cast<py::ssize_t>(head.name.size()), "replace"));
    result["n_blocks"] = head.n_blocks();
    return result;
}

void bind_gather(SegmentFile& file, const py::object& index, double scale, const py::object& out,
                 std::size_t place) {
    const SegmentHead& head = file.head();
    const auto n = static_cast<std::size_t>(require<std::int64_t>(index, "index", {kAny}).size());
    const auto* rows = arrays::in<std::int64_t>(index, "index", {n});
    const auto K = static_cast<std::size_t>(require<float>(out, "out", {n, kAny, head.width}).shape(1));
    if (head.kind != Kind::activations || place >= K) {
        throw py::value_error("these rows are not activations, or out has no such snapshot");
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (rows[i] < 0 || static_cast<std::uint64_t>(rows[i]) >= head.rows) {
            throw py::index_error("index[" + std::to_string(i) + "] is " + std::to_string(rows[i]) + ", but " +
                                  file.path() + " has " + std::to_string(head.rows) + " rows");
        }
    }
    float* target = arrays::out<float>(out, "out", {n, K, head.width}) + place * head.width;
    const py::gil_scoped_release release;
    file.gather(unpack_kernels(active_level()), rows, n, static_cast<float>(scale), target, K * head.width);
}

Array<std::int32_t> bind_read_tokens(const SegmentFile& file) {
    const SegmentHead& head = file.head();
    if (head.kind != Kind::tokens) {
        throw py::value_error(file.path() + " holds no tokens");
    }
    Array<std::int32_t> rows({static_cast<py::ssize_t>(head.rows), static_cast<py::ssize_t>(head.width)});
    std::int32_t* out = rows.mutable_data();
    const py::gil_scoped_release release;
    file.read_tokens(out);
    return rows;
}

std::vector<std::size_t> bind_damaged_blocks(const SegmentFile& file) {
    const py::gil_scoped_release release;
    return file.damaged_blocks();
}

py::array_t<double> column_sums(const SegmentFile& file) {
    const std::vector<double>& sums = file.head().column_sums;
    return py::array_t<double>(static_cast<py::ssize_t>(sums.size()), sums.data());
}

// bytes() of memory as uint8, given back to the pool when the last view of it is gone.
py::array take_buffer(const std::shared_ptr<BufferPool>& pool) {
    struct Loan {
        std::shared_ptr<BufferPool> pool;
        void* buffer;
        ~Loan() { pool->give_back(buffer); }
    };
    auto* loan = new Loan{pool, pool->take()};
    const py::capsule owner(loan, [](void* pointer) { delete static_cast<Loan*>(pointer); });
    return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(pool->bytes()), static_cast<std::uint8_t*>(loan->buffer),
                                     owner);
}

// In a forked child the threads do not exist, and locks may be held by none: what cannot be joined is left alone.
struct InThisProcess {
    void operator()(Prefetcher* prefetcher) const {
        if (prefetcher->is_of_this_process()) {
            delete prefetcher;
        }
    }
};

std::unique_ptr<Prefetcher, InThisProcess> make_prefetcher(std::uint64_t store, std::uint32_t width, const std::string& dtype,
                                            std::vector<std::string> snapshots, const std::vector<double>& scales,
                                            bool bf16, bool stream, bool direct, int n_threads) {
    if (snapshots.empty() || snapshots.size() != scales.size() || n_threads < 1) {
        throw py::value_error("a prefetcher needs a scale for each snapshot, and at least one thread");
    }
    StoreLayout layout;
    layout.store = store;
    layout.width = width;
    layout.item = parse_item(dtype);
    layout.snapshots = std::move(snapshots);
    for (const double scale : scales) {
        layout.scales.push_back(static_cast<float>(scale));
        if (!std::isfinite(layout.scales.back())) {
            throw py::value_error("scales must be finite in float32");
        }
    }
    layout.output = bf16 ? 1 : 0;
    layout.stream = stream;
    layout.direct = direct;
    return std::unique_ptr<Prefetcher, InThisProcess>(
        new Prefetcher(std::move(layout), static_cast<unsigned>(n_threads)));
}

using RunTuple = std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t, std::vector<std::string>>;

std::uint64_t bind_submit(Prefetcher& prefetcher, const std::vector<RunTuple>& runs,
                          const py::object& targets, const std::vector<std::uintptr_t>& batches,
                          std::size_t batch_rows, std::size_t n_snapshots) {
    const py::array places_n = require<std::int64_t>(targets, "targets", {kAny});
    const auto* target_n = static_cast<const std::int64_t*>(places_n.data());
    Window window;
    std::size_t total = 0;
    for (const auto& [shard, shard_rows, first, rows, paths] : runs) {
        if (rows < 1 || first + rows > shard_rows || paths.size() != n_snapshots) {
            throw py::value_error("a run lies outside of its shard, or lacks a path for a snapshot");
        }
        window.runs.push_back({shard, shard_rows, first, rows, total, paths});
        total += static_cast<std::size_t>(rows);
    }
    if (static_cast<std::size_t>(places_n.size()) != total || batch_rows < 1) {
        throw py::value_error("targets must have one entry for each row of the runs");
    }
    window.targets.assign(target_n, target_n + total);
    const auto places = static_cast<std::int64_t>(batches.size() * batch_rows);
    for (const std::int64_t target : window.targets) {
        if (target >= places) {
            throw py::value_error("a target lies outside of the batches");
        }
    }
    for (const std::uintptr_t address : batches) {
        window.batches.push_back(reinterpret_cast<void*>(address));
    }
    window.batch_rows = batch_rows;
    const py::gil_scoped_release release;
    return prefetcher.submit(std::move(window));
}

}  // namespace

void bind_store(py::module_& m) {
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) {
                std::rethrow_exception(pointer);
            }
        } catch (const FormatError& error) {
            py::set_error(py::module_::import("crosscoder.errors").attr("DataError"), error.what());
        } catch (const FileError& error) {
            errno = error.code();
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path().c_str());
        }
    });

    m.def("write_activations", &bind_write_activations, py::arg("path"), py::arg("temporary"), py::arg("x"),
          py::kw_only(), py::arg("dtype"), py::arg("group"), py::arg("store"), py::arg("shard"), py::arg("name"));
    m.def("write_tokens", &bind_write_tokens, py::arg("path"), py::arg("temporary"), py::arg("rows"),
          py::kw_only(), py::arg("store"), py::arg("shard"));

    py::class_<SegmentFile>(m, "SegmentFile")
        .def(py::init<const std::string&>(), py::arg("path"))
        .def_property_readonly("head", [](const SegmentFile& file) { return head_as_dict(file.head()); })
        .def_property_readonly("path", &SegmentFile::path)
        .def("column_sums", &column_sums)
        .def("damaged_blocks", &bind_damaged_blocks)
        .def("read_tokens", &bind_read_tokens)
        .def("gather", &bind_gather, py::arg("index"), py::arg("scale"), py::arg("out"),
             py::arg("place"));

    py::class_<BufferPool, std::shared_ptr<BufferPool>>(m, "BufferPool")
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def("take", &take_buffer);

    py::class_<Prefetcher, std::unique_ptr<Prefetcher, InThisProcess>>(m, "Prefetcher")
        .def(py::init(&make_prefetcher), py::kw_only(), py::arg("store"), py::arg("width"), py::arg("dtype"),
             py::arg("snapshots"), py::arg("scales"), py::arg("bf16"), py::arg("stream"), py::arg("direct"),
             py::arg("n_threads"))
        .def("submit", &bind_submit, py::arg("runs"), py::arg("targets"), py::arg("batches"),
             py::arg("batch_rows"), py::arg("n_snapshots"))
        .def("is_done", &Prefetcher::is_done, py::arg("ticket"))
        .def("wait", &Prefetcher::wait, py::arg("ticket"), py::call_guard<py::gil_scoped_release>())
        .def("is_of_this_process", &Prefetcher::is_of_this_process)
        .def("drain", &Prefetcher::drain, py::call_guard<py::gil_scoped_release>());
}

}  // namespace crosscoder
