// The two ways of going over (outer, classes, inner), and who goes where in parallel.
//
//   a row     the classes lie side by side: vectors along the classes, one row after the other
//   a block   up to BLOCK rows at once, vectors across the rows, one class after the other: where
//             `inner` separates the classes, and where the classes are too few to fill vectors
//
// Which way, and where blocks begin, depends on the shape alone, and no row's numbers meet those of
// another: the answer is the same for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "layout.h"
#include "vectors.h"

namespace custom_ops {

constexpr int64_t BLOCK = 128;
constexpr int64_t FEW_CLASSES = 32;
constexpr int64_t WORK = 1 << 15;  // elements below which a second thread costs more than it gives

// Rows first … first + n − 1; `column` of `outer` where they lie side by side.
struct Block {
  int64_t first, n, outer, column;
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

// What a block reads: for class k, one number for each of its rows.
template <typename acc_t>
class Slices {
 public:
  Slices(const Source<acc_t>& source, const View& x, const Block& b)
      : source_(source), base_(b.outer * x.stride + b.column), step_(x.inner), n_(b.n) {
    if (x.inner > 1) return;
    tile_.reset(new acc_t[x.classes * b.n]);
    const int64_t first = b.first * x.stride;
    if (source.direct()) {
      transpose(source.load(first, 0, nullptr), x.stride, b.n, x.classes, tile_.get(), b.n);
      return;
    }
    acc_t rows[BLOCK * FEW_CLASSES];
    for (int64_t r = 0; r < b.n; ++r) {
      source.load(first + r * x.stride, x.classes, &rows[r * x.classes]);
    }
    transpose(rows, x.classes, b.n, x.classes, tile_.get(), b.n);
  }

  const acc_t* operator[](int64_t k) {
    return tile_ ? &tile_[k * n_] : source_.load(base_ + k * step_, n_, buffer_);
  }

  // Of class k and row r, without the other rows.
  acc_t at(int64_t k, int64_t r) const {
    return tile_ ? tile_[k * n_ + r] : source_[base_ + k * step_ + r];
  }

 private:
  Source<acc_t> source_;
  int64_t base_, step_, n_;
  std::unique_ptr<acc_t[]> tile_;
  acc_t buffer_[BLOCK];
};

// What a block writes.
template <typename acc_t>
class SliceSink {
 public:
  SliceSink(const Sink<acc_t>& sink, const View& x, const Block& b)
      : sink_(sink), x_(x), b_(b), base_(b.outer * x.stride + b.column) {
    if (x.inner == 1) tile_.reset(new acc_t[x.classes * b.n]);
  }

  acc_t* begin(int64_t k) {
    return tile_ ? &tile_[k * b_.n] : sink_.begin(base_ + k * x_.inner, buffer_);
  }

  void end(int64_t k) {
    if (!tile_) sink_.end(buffer_, base_ + k * x_.inner, b_.n);
  }

  ~SliceSink() {
    if (!tile_) return;
    const int64_t first = b_.first * x_.stride;
    if (sink_.direct()) {
      acc_t* rows = sink_.begin(first, nullptr);
      transpose(tile_.get(), b_.n, x_.classes, b_.n, rows, x_.stride);
      return;
    }
    acc_t rows[BLOCK * FEW_CLASSES];
    transpose(tile_.get(), b_.n, x_.classes, b_.n, rows, x_.classes);
    for (int64_t r = 0; r < b_.n; ++r) {
      sink_.end(&rows[r * x_.classes], first + r * x_.stride, x_.classes);
    }
  }

 private:
  Sink<acc_t> sink_;
  const View& x_;
  const Block& b_;
  int64_t base_;
  std::unique_ptr<acc_t[]> tile_;
  acc_t buffer_[BLOCK];
};

}  // namespace custom_ops
