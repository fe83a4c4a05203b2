// What XLA calls.

#include "adam.h"
#include "windows.h"
#include "winograd.h"

using In = ffi::Buffer<ffi::F32, 4>;
using Out = ffi::Result<In>;

static ffi::Error done(bool enough) {
  if (enough) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a convolution to work in");
}

static Grid fine(In image) {
  const auto size = image.dimensions();
  return {image.typed_data(), size[0], size[1] / 2, size[2] / 2, size[3], 4};
}
static Grid coarse(const In& code) {
  const auto size = code.dimensions();
  return {code.typed_data(), size[0], size[1], size[2], size[3], 1};
}
static ffi::Error WinogradForward(ffi::ThreadPool pool, In image, In kernel, Out code) {
  return done(correlate(pool, fine(image), kernel.typed_data(), coarse(*code), false));
}
// the kernel as [5, 5, out, in]
static ffi::Error WinogradInputGradient(ffi::ThreadPool pool, In code, In kernel, Out image) {
  return done(correlate(pool, coarse(code), kernel.typed_data(), fine(*image), true));
}
static ffi::Error WinogradKernelGradient(ffi::ThreadPool pool, In image, In code, Out kernel) {
  return done(correlate_adjoint(pool, fine(image), coarse(code), kernel->typed_data()));
}

static Windows windows(const In& image, const In& kernel, const In& code, int64_t stride,
                       int64_t top, int64_t left) {
  const auto x = image.dimensions(), w = kernel.dimensions(), y = code.dimensions();
  return {x[0], x[1], x[2], x[3], y[1], y[2], y[3], w[0], stride, top, left};
}
static ffi::Error WindowsForward(ffi::ThreadPool pool, int64_t stride, int64_t top, int64_t left,
                                 In image, In kernel, Out code) {
  return done(windows_forward(pool, windows(image, kernel, *code, stride, top, left),
                              image.typed_data(), kernel.typed_data(), code->typed_data()));
}
static ffi::Error WindowsInputGradient(ffi::ThreadPool pool, int64_t stride, int64_t top,
                                       int64_t left, In code, In kernel, Out image) {
  return done(windows_input_gradient(pool, windows(*image, kernel, code, stride, top, left),
                                     code.typed_data(), kernel.typed_data(), image->typed_data()));
}
static ffi::Error WindowsKernelGradient(ffi::ThreadPool pool, int64_t stride, int64_t top,
                                        int64_t left, In image, In code, Out kernel) {
  return done(windows_kernel_gradient(pool, windows(image, *kernel, code, stride, top, left),
                                      image.typed_data(), code.typed_data(), kernel->typed_data()));
}

using Any = ffi::AnyBuffer;

static ffi::Error Adam(ffi::ThreadPool pool, double b1, double b2, double eps, Any gradient,
                       Any mean, Any square, Any corrections, Any length, ffi::Result<Any> step,
                       ffi::Result<Any> new_mean, ffi::Result<Any> new_square) {
  adam(pool, gradient.element_count(), b1, b2, eps, corrections.typed_data<float>(),
       *length.typed_data<float>(), gradient.typed_data<float>(), mean.typed_data<float>(), square.typed_data<float>(),
       step->typed_data<float>(), new_mean->typed_data<float>(), new_square->typed_data<float>());
  return ffi::Error::Success();
}
static ffi::Error SquaredLength(ffi::ThreadPool pool, Any x, ffi::Result<Any> sum) {
  *sum->typed_data<float>() = squared_length(pool, x.element_count(), x.typed_data<float>());
  return ffi::Error::Success();
}

#define WINOGRAD ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<In>().Arg<In>().Ret<In>()
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(vaejax_squared_length, SquaredLength,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Ret<Any>());
