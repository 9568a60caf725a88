// Two ways of going over (outer, classes, inner), and how the work is shared by threads. Rows of
// few float32 classes have a third one on AVX-512 (groups.h).
//
//   a row     the classes lie side by side: vectors along the classes, one row after the other
//   a block   up to BLOCK rows at once, vectors across the rows, one class after the other: where
//             `inner` separates the classes, and where the classes are too few to fill vectors
//
// The way and the blocks depend on the shape alone, and no row is added to another. So the result
// is the same for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "layout.h"
#include "vectors.h"

namespace custom_ops {

constexpr int64_t BLOCK = 128;
constexpr int64_t RUN = 32;  // classes of a block that are worked on together
constexpr int64_t FEW_CLASSES = RUN;
constexpr int64_t WORK = 1 << 15;  // elements below which a second thread costs more than it gives

// Rows first … first + n − 1; `column` of `outer` where they lie side by side.
struct Block {
  int64_t first, n, outer, column;

  // Where row `first` + i begins.
  int64_t at(const View& x, int64_t i) const {
    return x.inner > 1 ? outer * x.stride + column + i : (first + i) * x.stride;
  }
};

inline bool in_blocks(const View& x) { return x.inner > 1 || x.classes <= FEW_CLASSES; }

template <typename F>
void each_row(const View& x, F f) {
  if (!x.numel()) return;
  at::parallel_for(0, x.outer, std::max<int64_t>(1, WORK / x.classes), [&](int64_t r, int64_t end) {
    for (; r < end; ++r) f(r);
  });
}

template <typename F>
void each_block(const View& x, F f) {
  if (!x.numel()) return;
  const int64_t line = x.inner > 1 ? x.inner : x.outer;  // rows that a block may run along
  const int64_t in_line = (line + BLOCK - 1) / BLOCK;
  const int64_t blocks = in_line * (x.rows() / line);
  const int64_t grain = std::max<int64_t>(1, WORK / (x.classes * std::min(line, BLOCK)));
  at::parallel_for(0, blocks, grain, [&](int64_t b, int64_t end) {
    for (; b < end; ++b) {
      const int64_t o = b / in_line, column = b % in_line * BLOCK;
      f(Block{o * line + column, std::min(BLOCK, line - column), o, column});
    }
  });
}

// Calls f(first, count) for every run of up to RUN classes.
template <typename F>
void each_run(int64_t classes, F f) {
  for (int64_t first = 0; first < classes; first += RUN) f(first, std::min(RUN, classes - first));
}

// A run of a block's classes, copied side by side. If `inner` is a power of two, the rows of
// different classes share cache sets in the tensor, and would evict each other.
template <typename acc_t>
class Tile {
 public:
  Tile(const Source<acc_t>& source, const View& x, const Block& b) : Tile(source, x, b, x.stride) {}

  // Of numbers of another stride than x.
  Tile(const Source<acc_t>& source, const View& x, const Block& b, int64_t stride)
      : source_(source), x_(x), b_(b), stride_(stride), base_(b.outer * stride + b.column) {}

  // Reads the run. A block of one run is read once and then kept.
  acc_t* read(int64_t first, int64_t count) {
    if (first == first_) return values_;
    first_ = first;
    if (x_.inner == 1) {
      read_rows();
      return values_;
    }
    for (int64_t k = 0; k < count; ++k) {
      acc_t* to = values_ + k * b_.n;
      const acc_t* slice = load(first + k, to);
      if (slice == to) continue;
      each_vector<acc_t>(b_.n, [=](int64_t i, int64_t n) INLINE {
        Vec<acc_t>::loadu(slice + i, n).store(to + i, n);
      });
    }
    return values_;
  }

  // Class k, which is looked at once: where it lies, or in a buffer until the next is read.
  const acc_t* once(int64_t k) {
    if (x_.inner == 1) return read(0, x_.classes) + k * b_.n;
    first_ = -1;  // nothing is kept
    return load(k, values_);
  }

 private:
  static constexpr int64_t LINE = 64 / sizeof(acc_t), AHEAD = 4;

  const acc_t* load(int64_t k, acc_t* buffer) const {
    const int64_t at = base_ + k * x_.inner;
    // The hardware prefetcher does not recognise the step to the next class.
    for (int64_t i = 0; i < b_.n; i += LINE) source_.prefetch(at + AHEAD * x_.inner + i);
    return source_.load(at, b_.n, buffer);
  }

  void read_rows() {
    const int64_t first = b_.first * stride_;
    if (source_.direct()) {
      transpose(source_.load(first, 0, nullptr), stride_, b_.n, x_.classes, values_, b_.n);
      return;
    }
    acc_t rows[BLOCK * FEW_CLASSES];
    for (int64_t r = 0; r < b_.n; ++r) {
      source_.load(first + r * stride_, x_.classes, &rows[r * x_.classes]);
    }
    transpose(rows, x_.classes, b_.n, x_.classes, values_, b_.n);
  }

  Source<acc_t> source_;
  const View& x_;
  const Block& b_;
  int64_t stride_, base_, first_ = -1;
  alignas(64) acc_t values_[BLOCK * RUN];
};

// What a block writes.
template <typename acc_t>
class SliceSink {
 public:
  SliceSink(const Sink<acc_t>& sink, const View& x, const Block& b)
      : sink_(sink), x_(x), b_(b), base_(b.outer * x.stride + b.column) {}

  acc_t* begin(int64_t k) {
    return x_.inner == 1 ? values_ + k * b_.n : sink_.begin(base_ + k * x_.inner, values_);
  }

  void end(int64_t k) {
    if (x_.inner > 1) sink_.end(values_, base_ + k * x_.inner, b_.n);
  }

  ~SliceSink() {
    if (x_.inner > 1) return;
    const int64_t first = b_.first * x_.stride;
    if (sink_.direct()) {
      acc_t* rows = sink_.begin(first, nullptr);
      transpose(values_, b_.n, x_.classes, b_.n, rows, x_.stride);
      return;
    }
    acc_t rows[BLOCK * FEW_CLASSES];
    transpose(values_, b_.n, x_.classes, b_.n, rows, x_.classes);
    for (int64_t r = 0; r < b_.n; ++r) {
      sink_.end(&rows[r * x_.classes], first + r * x_.stride, x_.classes);
    }
  }

 private:
  Sink<acc_t> sink_;
  const View& x_;
  const Block& b_;
  int64_t base_;
  alignas(64) acc_t values_[BLOCK * FEW_CLASSES];
};

}  // namespace custom_ops
