// The functions that XLA calls, by its foreign function interface.

#include "adam.h"
#include "norm.h"
#include "windows.h"
#include "winograd.h"

using In = ffi::Buffer<ffi::F32, 4>;
using Out = ffi::Result<In>;

static ffi::Error status(bool had_memory) {
  if (had_memory) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "no memory for the intermediate results of a convolution");
}

// The names of the arrays are those of a convolution from `image` to `features`.

static Grid grid(const In& array, int64_t stride) {
  const auto size = array.dimensions();
  return {array.typed_data(), size[0], size[1] / stride, size[2] / stride, size[3], stride};
}
static ffi::Error WinogradForward(ffi::ThreadPool pool, int64_t stride, In image, In kernel,
                                  Out features) {
  return status(
      correlate(pool, grid(image, stride), kernel.typed_data(), grid(*features, 1), false));
}
// takes the kernel as [taps, taps, features, image]
static ffi::Error WinogradInputGradient(ffi::ThreadPool pool, int64_t stride, In features,
                                        In kernel, Out image) {
  return status(
      correlate(pool, grid(features, 1), kernel.typed_data(), grid(*image, stride), true));
}
static ffi::Error WinogradKernelGradient(ffi::ThreadPool pool, int64_t stride, In image,
                                         In features, Out kernel) {
  return status(
      correlate_adjoint(pool, grid(image, stride), grid(features, 1), kernel->typed_data()));
}

static Windows windows(const In& image, const In& kernel, const In& features, int64_t stride,
                       int64_t top, int64_t left) {
  const auto x = image.dimensions(), w = kernel.dimensions(), y = features.dimensions();
  return {x[0], x[1], x[2], x[3], y[1], y[2], y[3], w[0], stride, top, left};
}
static ffi::Error WindowsForward(ffi::ThreadPool pool, int64_t stride, int64_t top, int64_t left,
                                 In image, In kernel, Out features) {
  return status(windows_forward(pool, windows(image, kernel, *features, stride, top, left),
                                image.typed_data(), kernel.typed_data(), features->typed_data()));
}
static ffi::Error WindowsInputGradient(ffi::ThreadPool pool, int64_t stride, int64_t top,
                                       int64_t left, In features, In kernel, Out image) {
  return status(windows_input_gradient(pool, windows(*image, kernel, features, stride, top, left),
                                       features.typed_data(), kernel.typed_data(),
                                       image->typed_data()));
}
static ffi::Error WindowsKernelGradient(ffi::ThreadPool pool, int64_t stride, int64_t top,
                                        int64_t left, In image, In features, Out kernel) {
  return status(windows_kernel_gradient(pool, windows(image, *kernel, features, stride, top, left),
                                        image.typed_data(), features.typed_data(),
                                        kernel->typed_data()));
}

using Channels = ffi::Buffer<ffi::F32, 1>;
using Pairs = ffi::Buffer<ffi::F32, 3>;  // [images, 2, ...]

static Norm norm(const In& x, const Pairs& statistics) {
  const auto size = x.dimensions();
  return {size[0], size[1] * size[2], size[3], statistics.dimensions()[2]};
}
static ffi::Error NormSilu(ffi::ThreadPool pool, double epsilon, In x, Channels scale,
                           Channels bias, Pairs modulation, Out y, ffi::Result<Pairs> statistics) {
  norm_silu(pool, norm(x, *statistics), epsilon, x.typed_data(), scale.typed_data(),
            bias.typed_data(), modulation.typed_data(), y->typed_data(),
            statistics->typed_data());
  return ffi::Error::Success();
}
static ffi::Error NormSiluGradient(ffi::ThreadPool pool, In dy, In x, Channels scale,
                                   Channels bias, Pairs modulation, Pairs statistics, Out dx,
                                   ffi::Result<Channels> dscale, ffi::Result<Channels> dbias,
                                   ffi::Result<Pairs> dmodulation) {
  norm_silu_gradient(pool, norm(x, statistics), dy.typed_data(), x.typed_data(),
                     scale.typed_data(), bias.typed_data(), modulation.typed_data(),
                     statistics.typed_data(), dx->typed_data(), dscale->typed_data(),
                     dbias->typed_data(), dmodulation->typed_data());
  return ffi::Error::Success();
}

using Any = ffi::AnyBuffer;

static ffi::Error Adam(ffi::ThreadPool pool, double b1, double b2, double eps, Any gradient,
                       Any mean, Any square, Any corrections, Any norm, ffi::Result<Any> step,
                       ffi::Result<Any> new_mean, ffi::Result<Any> new_square) {
  adam(pool, gradient.element_count(), b1, b2, eps, corrections.typed_data<float>(),
       *norm.typed_data<float>(), gradient.typed_data<float>(), mean.typed_data<float>(),
       square.typed_data<float>(), step->typed_data<float>(), new_mean->typed_data<float>(),
       new_square->typed_data<float>());
  return ffi::Error::Success();
}
static ffi::Error SquaredNorm(ffi::ThreadPool pool, Any x, ffi::Result<Any> sum) {
  *sum->typed_data<float>() = squared_norm(pool, x.element_count(), x.typed_data<float>());
  return ffi::Error::Success();
}

#define WINOGRAD               \
  ffi::Ffi::Bind()             \
      .Ctx<ffi::ThreadPool>()  \
      .Attr<int64_t>("stride") \
      .Arg<In>()               \
      .Arg<In>()               \
      .Ret<In>()
#define WINDOWS                \
  ffi::Ffi::Bind()             \
      .Ctx<ffi::ThreadPool>()  \
      .Attr<int64_t>("stride") \
      .Attr<int64_t>("top")    \
      .Attr<int64_t>("left")   \
      .Arg<In>()               \
      .Arg<In>()               \
      .Ret<In>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_winograd_forward, WinogradForward, WINOGRAD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_winograd_input_gradient, WinogradInputGradient, WINOGRAD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_winograd_kernel_gradient, WinogradKernelGradient, WINOGRAD);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_windows_forward, WindowsForward, WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_windows_input_gradient, WindowsInputGradient, WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_windows_kernel_gradient, WindowsKernelGradient, WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_norm_silu, NormSilu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<double>("epsilon")
                                  .Arg<In>()
                                  .Arg<Channels>()
                                  .Arg<Channels>()
                                  .Arg<Pairs>()
                                  .Ret<In>()
                                  .Ret<Pairs>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_norm_silu_gradient, NormSiluGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<Channels>()
                                  .Arg<Channels>()
                                  .Arg<Pairs>()
                                  .Arg<Pairs>()
                                  .Ret<In>()
                                  .Ret<Channels>()
                                  .Ret<Channels>()
                                  .Ret<Pairs>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_adam, Adam,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<double>("b1")
                                  .Attr<double>("b2")
                                  .Attr<double>("eps")
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_squared_norm, SquaredNorm,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Ret<Any>());
