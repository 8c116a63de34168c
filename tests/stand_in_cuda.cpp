// A CUDA device without a GPU: its tensors say that they are on "cuda:0", lie in the CPU's memory,
// and every operator on them runs the CPU's kernel. Where an operator is handed tensors of both
// devices it is refused, as CUDA refuses it. So whole trainings go through all that the package
// does differently on a GPU, and each mix of devices is an error.
//
// Built by stand_in_cuda.sh against the installed torch, which it needs to be loaded before
// (LD_PRELOAD); the functions of torch.cuda are replaced by stand_in_cuda.py.
#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Storage;
using c10::Stream;

const Device DEVICE(c10::kCUDA, 0);

// --- one device, one stream, everything done at once ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::DEFAULT, DEVICE); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Device*>(&DEVICE);  // anything that is not null
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
c10::impl::DeviceGuardImplRegistrar registered_guard(c10::kCUDA, new Guard());

struct StandInHooks final : at::CUDAHooksInterface {
  explicit StandInHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
};

void release(void* bytes) { std::free(bytes); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    if (data) std::memset(data, 0xff, bytes);  // NaN: a use of unwritten memory shows
    TORCH_CHECK(data || !bytes, "out of memory");
    return {data, data, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Memory memory;

// --- the same memory as a tensor of the other device ---

Tensor same_memory(const Tensor& t, Device device, c10::DispatchKey key,
                   c10::Allocator* allocator) {
  auto* kept = new Storage(t.storage());  // as long as the new tensor lives
  c10::DataPtr data(
      const_cast<void*>(kept->data()), kept, [](void* s) { delete static_cast<Storage*>(s); },
      device);
  Storage storage(Storage::use_byte_size_t(), kept->nbytes(), std::move(data), allocator, true);
  Tensor other = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                          c10::DispatchKeySet(key), t.dtype());
  other.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return other;
}

Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  Tensor other = same_memory(t, c10::kCPU, c10::DispatchKey::CPU, c10::GetAllocator(c10::kCPU));
  if (t.is_neg()) other._set_neg(true);
  return other;
}

Tensor on_device(const Tensor& t) {
  return t.defined() ? same_memory(t, DEVICE, c10::DispatchKey::CUDA, &memory) : t;
}

// A view keeps its base's storage, so that autograd knows the two to be one.
Tensor view_of(const Tensor& base, const Tensor& t) {
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, Storage(base.storage()), base.key_set(), t.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return view;
}

// --- every operator that has no kernel of its own below ---

// CUDA takes these with tensors of both devices, too.
const std::unordered_set<std::string> MIXED = {"aten::index.Tensor", "aten::index.Tensor_out",
                                               "aten::index_put_", "aten::_index_put_impl_",
                                               "aten::_copy_from"};

struct Arguments {
  const c10::FunctionSchema& schema;
  std::vector<IValue> given;        // on the device
  std::vector<Tensor> handed_over;  // the same on the CPU
  bool any_on_device = false;
  std::string on_cpu;  // the name of one that is there, and is no scalar

  void note(const Tensor& t, const std::string& name) {
    if (!t.defined()) return;
    if (t.is_cuda())
      any_on_device = true;
    else if (t.device().is_cpu() && t.dim() > 0)
      on_cpu = name;
  }

  IValue hand_over(size_t i) {
    const IValue& value = given[i];
    const std::string& name = schema.arguments()[i].name();
    if (value.isTensor()) {
      note(value.toTensor(), name);
      return handed_over[i] = ::on_cpu(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) {
        note(t, name);
        list.push_back(::on_cpu(t));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorList()) {
        if (t) note(*t, name);
        list.push_back(t ? std::optional<Tensor>(::on_cpu(*t)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      any_on_device = true;
      return Device(c10::kCPU);
    }
    return value;
  }

  // The argument that a result is, or is a view of; none: size().
  size_t source(const c10::AliasInfo* alias) const {
    for (size_t i = 0; alias && i < given.size(); i++) {
      const c10::AliasInfo* mine = schema.arguments()[i].alias_info();
      if (!mine || !given[i].isTensor()) continue;
      for (const auto& set : alias->beforeSets())
        if (mine->beforeSets().count(set)) return i;
    }
    return given.size();
  }
};

// What an operator wrote to: it may have resized it, or given it other memory.
Tensor written(const Tensor& given, const Tensor& on_the_cpu) {
  if (on_the_cpu.sizes() != given.sizes() ||
      on_the_cpu.storage().data() != given.storage().data()) {
    Tensor now = on_device(on_the_cpu);
    given.unsafeGetTensorImpl()->set_storage_keep_dtype(now.storage());
    given.unsafeGetTensorImpl()->set_sizes_and_strides(now.sizes(), now.strides(),
                                                       now.storage_offset());
  }
  return given;
}

IValue result(const IValue& value, const c10::Argument& declared, const Arguments& arguments) {
  const c10::AliasInfo* alias = declared.alias_info();
  if (value.isTensor() && value.toTensor().defined()) {
    const Tensor t = value.toTensor();
    const size_t i = arguments.source(alias);
    if (i < arguments.given.size()) {
      const Tensor given = arguments.given[i].toTensor();
      return alias->isWrite() ? written(given, arguments.handed_over[i]) : view_of(given, t);
    }
    return t.device().is_cpu() && arguments.any_on_device ? on_device(t) : t;
  }
  if (value.isTensorList()) {
    const size_t i = alias ? arguments.source(alias) : arguments.given.size();
    size_t base = i;
    for (size_t k = 0; alias && base == arguments.given.size() && k < base; k++)
      if (arguments.given[k].isTensor() && arguments.schema.arguments()[k].alias_info()) base = k;
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector())
      list.push_back(base < arguments.given.size() ? view_of(arguments.given[base].toTensor(), t)
                                                   : on_device(t));
    return list;
  }
  return value;
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  Arguments arguments{schema, {stack->end() - count, stack->end()}, std::vector<Tensor>(count)};
  for (size_t i = 0; i < count; i++) (*stack)[stack->size() - count + i] = arguments.hand_over(i);
  const std::string name = c10::toString(schema.operator_name());
  TORCH_CHECK(!arguments.any_on_device || arguments.on_cpu.empty() || MIXED.count(name),
              "two devices in ", name, ": ", arguments.on_cpu,
              " is on the CPU beside tensors on cuda:0");
  op.callBoxed(stack);
  const size_t results = schema.returns().size();
  for (size_t k = 0; k < results; k++) {
    IValue& value = (*stack)[stack->size() - results + k];
    value = result(value, schema.returns()[k], arguments);
  }
}

// --- what makes memory, copies between the devices, or looks at no memory ---

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor& copy(Tensor& to, const Tensor& from, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Scalar read_scalar(const Tensor& t) { return at::_local_scalar_dense(on_cpu(t)); }

const Tensor& resize(const Tensor& t, IntArrayRef size, std::optional<at::MemoryFormat>) {
  c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  const int64_t bytes = (c10::multiply_integers(size) + t.storage_offset()) * t.element_size();
  if (static_cast<int64_t>(t.storage().nbytes()) < bytes) {
    impl->set_storage_keep_dtype(empty(size, t.scalar_type(), {}, {}, {}, {}).storage());
    impl->set_storage_offset(0);
  }
  impl->set_sizes_contiguous(size);
  return t;
}

Tensor as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

Tensor view(const Tensor& t, IntArrayRef size) { return at::native::view(t, size); }

Tensor reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(t, size, stride);
}

Tensor& set_storage(Tensor& t, Storage storage, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}

// For Triton's interpreter, which runs on the CPU.
Tensor alias_on_cpu(const Tensor& t) { return t.is_cuda() ? on_cpu(t) : t.detach(); }

}  // namespace

namespace at {
using ::StandInHooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, StandInHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("_local_scalar_dense", &read_scalar);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

TORCH_LIBRARY(stand_in, m) {
  m.def("on_cpu(Tensor x) -> Tensor");
  m.impl("on_cpu", c10::DispatchKey::CUDA, &alias_on_cpu);
  m.impl("on_cpu", c10::DispatchKey::CPU, &alias_on_cpu);
}

// In place of torch's own, which knows this build to have no accelerator.
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace at::accelerator

extern "C" void stand_in_memory() { c10::SetAllocator(c10::kCUDA, &memory, 255); }
