// The only file that knows both Python and the C++ core: argument checks, GIL release, docstrings.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "huge_pages.hpp"
#include "levels.hpp"
#include "quantile_pool.hpp"
#include "quark_loss.hpp"
#include "rows.hpp"
#include "sampling.hpp"

namespace py = pybind11;

namespace {

// --- rows of logits ---------------------------------------------------------------------------

using quark::DType;

// Addresses and strides of a tensor that the Python side keeps alive during the call: bfloat16 has
// no buffer protocol. `elements` of them lie in its memory from there on.
quark::Rows make_rows(uintptr_t data, const std::string& dtype, int64_t inner, int64_t outer_stride,
                      int64_t inner_stride, int64_t elements) {
  const auto rows = [&](DType type) {
    return quark::Rows{
        reinterpret_cast<void*>(data), type, inner, outer_stride, inner_stride, elements};
  };
  if (dtype == "float32") return rows(DType::f32);
  if (dtype == "bfloat16") return rows(DType::bf16);
  if (dtype == "float16") return rows(DType::f16);
  throw std::invalid_argument("logits of dtype " + dtype +
                              "; the C++ kernels take float32, bfloat16 and float16");
}

// Contiguous and of this very type: a converted copy would be read, or written, in vain.
template <class T>
using Exact = py::array_t<T, py::array::c_style>;

// The address of as many values as there are rows, times `each`.
template <class T>
T* values_of(const char* name, Exact<T>& array, int64_t rows, size_t each = 1) {
  if (static_cast<uint64_t>(array.size()) != static_cast<uint64_t>(rows) * each) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) +
                                " values for " + std::to_string(rows) + " rows");
  }
  return array.mutable_data();  // throws if it is read-only
}

void bind_rows(py::module_& m) {
  m.def("isa", &quark::isa,
        "The instruction-set level of the kernels: v2, v3, v4 (x86-64) or generic.\n\n"
        "QUARK_FAST_ISA in the environment chooses a lower one; RuntimeError if it cannot be had.");
  m.def(
      "prefer_huge_pages",
      [](uintptr_t data, size_t bytes) {
        quark::prefer_huge_pages(reinterpret_cast<void*>(data), bytes);
      },
      py::arg("data"), py::arg("bytes"),
      "Advise the kernel to back a large buffer, not yet written, by huge pages.");

  py::class_<quark::Rows>(m, "Rows",
                          "Where the rows of a tensor lie: row n starts at element\n"
                          "(n // inner) * outer_stride + (n % inner) * inner_stride of `data`,\n"
                          "from where on its memory holds `elements`.")
      .def(py::init(&make_rows), py::arg("data"), py::arg("dtype"), py::arg("inner"),
           py::arg("outer_stride"), py::arg("inner_stride"), py::arg("elements"));
}

// --- quark_loss -------------------------------------------------------------------------------

using quark::Kl;

Kl kl_of(const std::string& name, bool has_ref) {
  if (!has_ref) return Kl::none;
  if (name == "policy_ref") return Kl::policy_ref;
  if (name == "ref_policy") return Kl::ref_policy;
  if (name == "sampled") return Kl::sampled;
  throw std::invalid_argument("kl = '" + name +
                              "'; choose 'policy_ref', 'ref_policy' or 'sampled'");
}

// Holds the arrays that the core knows by address.
struct Problem {
  quark::Problem core;
  Exact<int64_t> labels;
  Exact<float> weights;
};

Problem make_problem(const quark::Rows& logits, const std::optional<quark::Rows>& ref,
                     Exact<int64_t> labels, Exact<float> weights, int64_t vocab, int64_t width,
                     const std::string& kl, double kl_coef, double entropy_coef) {
  const int64_t rows = labels.size();
  if (weights.size() != rows) {
    throw std::invalid_argument(std::to_string(rows) + " labels but " +
                                std::to_string(weights.size()) + " weights");
  }
  const quark::Problem core{
      logits,        ref.value_or(quark::Rows{nullptr, DType::f32, 1, 0, 0, 0}),
      labels.data(), weights.data(),
      rows,          vocab,
      width,         kl_of(kl, ref.has_value()),
      kl_coef,       entropy_coef};
  return {core, std::move(labels), std::move(weights)};
}

void bind_quark_loss(py::module_& m) {
  py::class_<Problem>(m, "Problem",
                      "The inputs of the loss: logits and reference by address, which must stay\n"
                      "alive; labels int64, weights float32, contiguous.")
      .def(py::init(&make_problem), py::arg("logits"), py::arg("ref"),
           py::arg("labels").noconvert(), py::arg("weights").noconvert(), py::arg("vocab"),
           py::arg("width"), py::arg("kl"), py::arg("kl_coef"), py::arg("entropy_coef"));

  m.attr("STATS_PER_ROW") = sizeof(quark::RowStats) / sizeof(float);
  m.def(
      "quark_loss_forward",
      [](const Problem& problem, Exact<float> nll, Exact<float> kl, Exact<float> entropy,
         Exact<float> stats, const std::optional<quark::Rows>& grad, int threads) {
        const int64_t rows = problem.core.rows;
        float* const row_stats =
            values_of("stats", stats, rows, sizeof(quark::RowStats) / sizeof(float));
        const quark::RowOutputs out{values_of("nll", nll, rows), values_of("kl", kl, rows),
                                    values_of("entropy", entropy, rows),
                                    reinterpret_cast<quark::RowStats*>(row_stats)};
        const py::gil_scoped_release released;
        return quark::forward(problem.core, out, grad ? &*grad : nullptr, threads);
      },
      py::arg("problem"), py::arg("nll").noconvert(), py::arg("kl").noconvert(),
      py::arg("entropy").noconvert(), py::arg("stats").noconvert(), py::arg("grad"),
      py::arg("threads"),
      "The loss; per-row float32 results go to nll, kl, entropy, and STATS_PER_ROW floats a row\n"
      "to stats. With grad, its gradient goes there: it may be the logits.\n"
      "ValueError if anything does not fit, such as a label that is not masked and outside the\n"
      "vocabulary, or rows that reach beyond their memory; nothing is written.");
  m.def(
      "quark_loss_backward",
      [](const Problem& problem, Exact<float> stats, double scale, const quark::Rows& grad,
         int threads) {
        const float* const row_stats =
            values_of("stats", stats, problem.core.rows, sizeof(quark::RowStats) / sizeof(float));
        const py::gil_scoped_release released;
        quark::backward(problem.core, reinterpret_cast<const quark::RowStats*>(row_stats), scale,
                        grad, threads);
      },
      py::arg("problem"), py::arg("stats").noconvert(), py::arg("scale"), py::arg("grad"),
      py::arg("threads"), "The gradient of scale * loss, from the stats of quark_loss_forward.");
}

// --- sampling ---------------------------------------------------------------------------------

bool sample_tokens(const quark::Rows& logits, int64_t rows, int64_t vocab, Exact<float> weights,
                   Exact<int64_t> suppressed, double top_p, int64_t nucleus_of,
                   float nucleus_weight, Exact<int64_t> drawn_rows,
                   std::optional<Exact<float>> uniform, Exact<int64_t> tokens, Exact<bool> inside,
                   std::optional<Exact<float>> log_p, int threads) {
  const quark::Distribution from{logits,     weights.data(),    weights.size(),    rows,
                                 vocab,      suppressed.data(), suppressed.size(), top_p,
                                 nucleus_of, nucleus_weight};
  const int64_t count = drawn_rows.size();
  const quark::Draws draws{count,
                           drawn_rows.data(),
                           uniform ? values_of("uniform", *uniform, count) : nullptr,
                           values_of("tokens", tokens, count),
                           values_of("inside", inside, count),
                           log_p ? values_of("log_p", *log_p, count) : nullptr};
  const py::gil_scoped_release released;
  return quark::sample_tokens(from, draws, threads);
}

void bind_sampling(py::module_& m) {
  m.def(
      "sample_tokens", &sample_tokens, py::arg("logits"), py::arg("rows"), py::arg("vocab"),
      py::arg("weights").noconvert(), py::arg("suppressed").noconvert(), py::arg("top_p"),
      py::arg("nucleus_of"), py::arg("nucleus_weight"), py::arg("drawn_rows").noconvert(),
      py::arg("uniform").noconvert(), py::arg("tokens").noconvert(), py::arg("inside").noconvert(),
      py::arg("log_p").noconvert(), py::arg("threads"),
      "A token of each of drawn_rows goes to tokens, whether it is in the nucleus to inside, and\n"
      "unless log_p is None the log of its probability there to that (NaN outside the nucleus);\n"
      "without uniform numbers it is the lowest id of the highest logit. csrc/sampling.hpp has\n"
      "the equation. logits: as many times `rows` as there are weights, stream by stream.\n"
      "Returns whether all had one: those of NaN, +inf or nothing but -inf get -1.\n"
      "ValueError if anything does not fit; nothing is written.");
}

// --- quantile_pool ----------------------------------------------------------------------------

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// One value of each sample, by a member that fills at most the room it is given.
template <class T, class Write>
py::array_t<T> one_per_sample(int64_t size, Write write) {
  py::array_t<T> values(size);
  T* const out = values.mutable_data();
  int64_t written;
  {
    const py::gil_scoped_release released;
    written = write(out, size);
  }
  if (written < size) values.resize({written});  // another thread restored fewer meanwhile
  return values;
}

template <class Pool, class Label>
int64_t labels_into(const Pool& pool, py::array_t<Label, py::array::c_style> out) {
  Label* const data = out.mutable_data();  // throws if it is read-only
  const py::gil_scoped_release released;
  return pool.labels(data, out.size());
}

template <class Reward>
void bind_quantile_pool(py::module_& m, const char* name) {
  using Pool = quark::QuantilePool<Reward>;
  using Key = typename Pool::Key;
  const auto to_items = [](const Array<Key>& keys, const Array<Key>& ties) {
    if (keys.ndim() != 1 || ties.ndim() != 1 || keys.size() != ties.size()) {
      throw std::invalid_argument("keys and ties must be 1-D and of one length");
    }
    std::vector<typename Pool::Item> items(keys.size());
    for (size_t i = 0; i < items.size(); ++i) {
      items[i] = Pool::item_of(keys.data()[i], ties.data()[i]);
    }
    return items;
  };

  py::class_<Pool>(m, name,
                   "Exact streaming quantiles of rewards; csrc/quantile_pool.hpp promises.")
      .def(py::init<int, quark::Ties, quark::Remainder, uint64_t>(), py::arg("quantiles"),
           py::arg("ties"), py::arg("remainder"), py::arg("seed"))
      .def(
          "add",
          [](Pool& pool, const Array<Reward>& rewards) {
            py::array_t<int64_t> ids(rewards.size());
            int64_t* const out = ids.mutable_data();
            {
              const py::gil_scoped_release released;
              pool.add(rewards.data(), rewards.size(), out);
            }
            return ids;
          },
          py::arg("rewards"), "Add rewards; their ids, -1 for NaN, which is left out.")
      .def(
          "restore",
          [](Pool& pool, const Array<Reward>& rewards, const std::vector<int64_t>& run_sizes) {
            const py::gil_scoped_release released;
            pool.restore(rewards.data(), rewards.size(), run_sizes);
          },
          py::arg("rewards"), py::arg("run_sizes"),
          "Replace the content by what rewards and run_sizes gave.")
      .def("__len__", &Pool::size)
      .def_property_readonly("run_sizes", &Pool::run_sizes)
      .def(
          "rewards",
          [](const Pool& pool) {
            return one_per_sample<Reward>(
                pool.size(), [&](Reward* out, int64_t room) { return pool.rewards(out, room); });
          },
          "The rewards of all samples, oldest first.")
      .def(
          "labels",
          [](const Pool& pool) {
            return one_per_sample<int32_t>(
                pool.size(), [&](int32_t* out, int64_t room) { return pool.labels(out, room); });
          },
          "The quantiles of all samples, oldest first.")
      .def("labels_into", &labels_into<Pool, uint8_t>, py::arg("out").noconvert(),
           "labels(), written to uint8, int32 or int64; returns how many were.")
      .def("labels_into", &labels_into<Pool, int32_t>, py::arg("out").noconvert())
      .def("labels_into", &labels_into<Pool, int64_t>, py::arg("out").noconvert())
      .def(
          "look_up",
          [](const Pool& pool, const Array<int64_t>& ids) {
            py::array_t<Reward> rewards(ids.size());
            py::array_t<int64_t> quantiles(ids.size());
            Reward* const out_rewards = rewards.mutable_data();
            int64_t* const out_quantiles = quantiles.mutable_data();
            {
              const py::gil_scoped_release released;
              pool.look_up(ids.data(), ids.size(), out_rewards, out_quantiles);
            }
            return py::make_tuple(rewards, quantiles);
          },
          py::arg("ids"), "(rewards, quantiles) of given samples.")
      .def(
          "thresholds", [](const Pool& pool) { return to_numpy(pool.thresholds()); },
          "The K - 1 boundary rewards, the best first; NaN where there is none.")
      .def(
          "quantile_sizes", [](const Pool& pool) { return to_numpy(pool.quantile_sizes()); },
          "How many samples each quantile holds, the worst first.")
      .def(
          "sample",
          [](const Pool& pool, int64_t count, const std::vector<int>& from, uint64_t key) {
            typename Pool::Draw draw;
            {
              const py::gil_scoped_release released;
              draw = pool.sample(count, from, key);
            }
            return py::make_tuple(to_numpy(draw.ids), to_numpy(draw.rewards),
                                  to_numpy(draw.quantiles));
          },
          py::arg("count"), py::arg("quantiles"), py::arg("key"),
          "(ids, rewards, quantiles) of a draw; no quantiles named: from all.")
      .def(
          "count_up_to",
          [to_items](const Pool& pool, const Array<Key>& keys, const Array<Key>& ties) {
            return to_numpy(pool.count_up_to(to_items(keys, ties)));
          },
          py::arg("keys"), py::arg("ties"), "How many samples are at or before each place.")
      .def(
          "impose",
          [to_items](Pool& pool, const Array<Key>& keys, const Array<Key>& ties,
                     const std::vector<Key>& thresholds) {
            pool.impose(to_items(keys, ties), thresholds);
          },
          py::arg("keys"), py::arg("ties"), py::arg("thresholds"),
          "Use these boundaries, the best first, until the next change.")
      .def_property("imposed", &Pool::imposed, &Pool::set_imposed);
}

void bind_quantile_pools(py::module_& m) {
  py::enum_<quark::Ties>(m, "Ties", "How equal rewards are told apart.")
      .value("same", quark::Ties::same)
      .value("arrival", quark::Ties::arrival)
      .value("random", quark::Ties::random);
  py::enum_<quark::Remainder>(m, "Remainder", "Where the samples go that K does not divide.")
      .value("spread", quark::Remainder::spread)
      .value("last", quark::Remainder::last);
  bind_quantile_pool<float>(m, "QuantilePool32");
  bind_quantile_pool<double>(m, "QuantilePool64");
  m.def(
      "quantile_cut",
      [](int64_t n, int64_t j, int64_t k, quark::Remainder remainder) {
        if (n < 0 || k < 1 || k > INT32_MAX || j < 0 || j > k || (j > 0 && n > INT64_MAX / 2 / j)) {
          throw std::invalid_argument("0 <= j <= k, 1 <= k < 2^31, and j * n must fit in 62 bits");
        }
        return quark::quantile_cut(n, j, k, remainder);
      },
      py::arg("n"), py::arg("j"), py::arg("k"), py::arg("remainder"),
      "How many of n samples the best j of k quantiles hold.");
  m.def("block_reaches", py::vectorize(&quark::block_reaches), py::arg("n"), py::arg("cut"),
        py::arg("better"), py::arg("equal"),
        "Whether a block of equal rewards belongs to the best `cut` of n samples under\n"
        "Ties.same: `better` rewards are better, `equal` are this one. Arrays broadcast.");
  m.def(
      "permutation_slice",
      [](uint64_t n, uint64_t key, uint64_t start, uint64_t stop) {
        if (start > stop || stop > n || n > uint64_t{1} << 62) {
          throw std::invalid_argument("0 <= start <= stop <= n <= 2^62");
        }
        py::array_t<int64_t> out(static_cast<py::ssize_t>(stop - start));
        int64_t* const data = out.mutable_data();
        {
          const py::gil_scoped_release released;
          quark::permutation_slice(n, key, start, stop, data);
        }
        return out;
      },
      py::arg("n"), py::arg("key"), py::arg("start"), py::arg("stop"),
      "Elements start..stop-1 of a keyed permutation of 0..n-1, which is never written out.");
}

// --- token rows -------------------------------------------------------------------------------

// (tokens int32, ends int64) of a list of lists of Python ints, end to end: row i is
// tokens[ends[i - 1]:ends[i]]. None if it is anything else, or a token is not in 0..2^31 - 1.
py::object pack_rows(const py::list& rows) {
  const py::ssize_t n = PyList_GET_SIZE(rows.ptr());
  py::array_t<int64_t> ends(n);
  int64_t* const end = ends.mutable_data();
  int64_t total = 0;
  for (py::ssize_t i = 0; i < n; ++i) {
    PyObject* const row = PyList_GET_ITEM(rows.ptr(), i);
    if (!PyList_CheckExact(row)) return py::none();
    end[i] = total += PyList_GET_SIZE(row);
  }
  py::array_t<int32_t> tokens(total);
  int32_t* token = tokens.mutable_data();
  for (py::ssize_t i = 0; i < n; ++i) {
    PyObject* const row = PyList_GET_ITEM(rows.ptr(), i);
    const py::ssize_t length = PyList_GET_SIZE(row);
    for (py::ssize_t j = 0; j < length; ++j) {
      PyObject* const item = PyList_GET_ITEM(row, j);
      if (!PyLong_CheckExact(item)) return py::none();
      int overflow;
      const long value = PyLong_AsLongAndOverflow(item, &overflow);
      if (overflow != 0 || value < 0 || value > INT32_MAX) return py::none();
      *token++ = static_cast<int32_t>(value);
    }
  }
  return py::make_tuple(tokens, ends);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ core of quark_fast: fused loss, sampling and quantile pool.";
  // An editable install keeps its compiled module when the sources change (git pull). Raise this
  // and the number in quark_fast/__init__.py when a name, an argument or a meaning here changes.
  m.attr("interface") = 2;
  bind_rows(m);
  bind_quark_loss(m);
  bind_sampling(m);
  bind_quantile_pools(m);
  m.def("pack_rows", &pack_rows, py::arg("rows"),
        "(tokens int32, ends int64) of a list of lists of ints, end to end: row i is\n"
        "tokens[ends[i - 1]:ends[i]]. None if it is anything else, or a token is not in\n"
        "0..2^31 - 1.");
}
