// How the kernels see a tensor: (outer, classes, inner), never transposed in memory.
#pragma once

#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace custom_ops {

// A tensor whose element (o, k, i) lies at o·stride + k·inner + i.
struct View {
  at::Tensor tensor;
  int64_t outer, classes, inner, stride;
  bool classes_last;  // `tensor` has its classes moved to the end

  int64_t rows() const { return outer * inner; }
  int64_t numel() const { return rows() * classes; }
};

inline at::Tensor classes_last(const at::Tensor& x, int64_t dim) { return x.movedim(dim, -1); }

// x as it lies in memory, if that is one of the layouts, else a contiguous copy.
inline View view(const at::Tensor& x, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, x.dim());
  const int64_t classes = x.dim() ? x.size(dim) : 1;
  int64_t outer = 1, inner = 1;
  for (int64_t d = 0; d < x.dim(); ++d) (d < dim ? outer : inner) *= d == dim ? 1 : x.size(d);
  if (x.is_contiguous()) return {x, outer, classes, inner, classes * inner, false};
  if (x.dim() == 2 && dim == 1 && x.stride(1) == 1) {
    return {x, outer, classes, 1, x.stride(0), false};
  }
  const at::Tensor last = classes_last(x, dim);
  if (last.is_contiguous()) return {last, outer * inner, classes, 1, classes, true};
  return {x.contiguous(), outer, classes, inner, classes * inner, false};
}

// y, of x's shape, in the layout of the view of x.
inline View view_like(const View& x, const at::Tensor& y, int64_t dim) {
  const at::Tensor same = x.classes_last ? classes_last(y, dim) : y;
  return {same.contiguous(), x.outer, x.classes, x.inner, x.classes * x.inner, x.classes_last};
}

// Asks for huge pages before the first touch. With them, the page faults of a large fresh tensor
// take a fifth of the time. Nothing changes where the system does not give them on demand.
inline void advise_huge_pages(const at::Tensor& fresh) {
#ifdef __linux__
  constexpr std::uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(fresh.const_data_ptr());
  const auto first = (begin + page - 1) / page * page;
  const auto last = (begin + fresh.nbytes()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Fresh memory in the layout of the view of x.
inline View fresh_like(const View& x) {
  View y = x;
  y.tensor = at::empty(x.tensor.sizes(), x.tensor.options());
  y.stride = x.classes * x.inner;
  advise_huge_pages(y.tensor);
  return y;
}

// The view's tensor in the shape it was made from.
inline at::Tensor unview(const View& y, int64_t dim) {
  return y.classes_last ? y.tensor.movedim(-1, dim) : y.tensor;
}

}  // namespace custom_ops
