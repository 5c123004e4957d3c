// CPU kernels for the operators of torch that torch_npu has NPU kernels for: the same operator of the CPU, run on the
// same memory. torch_npu's registration table stays the truth: an operator without an NPU kernel gets none here, so it
// takes torch_npu's fallback to the CPU, or is an error under TORCH_NPU_FALLBACK_CPU_DISABLE=1.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <unordered_map>

namespace {
constexpr auto NPU = c10::DeviceType::PrivateUse1;

bool on_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == NPU; }

// ---- what the cores cannot do

bool has_fp8() {
  const char* name = getenv("STANDIN_SOC");
  return name && std::string(name).rfind("Ascend950", 0) == 0;
}

void check_dtype(const std::string& op, at::ScalarType dtype) {
  TORCH_CHECK(dtype != at::kDouble && dtype != at::kComplexDouble, "NPU restriction: ", op, " on float64");
  bool is_missing = c10::isFloat8Type(dtype) && !has_fp8();
  TORCH_CHECK(!is_missing, "NPU restriction: ", op, " on float8, which A2 and A3 do not have");
}

// Documented limits of operators of torch.
void check_arguments(const std::string& op, at::ArrayRef<c10::IValue> arguments) {
  if (op == "aten::topk") TORCH_CHECK(arguments[4].toBool(), "NPU restriction: topk(sorted=False)");
  if (op == "aten::histc")
    TORCH_CHECK(at::isFloatingType(arguments[0].toTensor().scalar_type()), "NPU restriction: histc of integers");
}

// ---- the same memory as a tensor of the CPU, and back

class CpuView {
 public:
  at::Tensor of(const at::Tensor& tensor) {
    if (!on_npu(tensor)) return tensor;
    if (!device_) device_ = tensor.device();
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    c10::DataPtr data(storage->mutable_data(), c10::Device(c10::kCPU));
    c10::Storage same(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data), nullptr, false);
    const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
    auto view = at::detail::make_tensor<c10::TensorImpl>(std::move(same), cpu, tensor.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    view._set_conj(tensor.is_conj());
    view._set_neg(tensor.is_neg());
    originals_.emplace(view.storage().unsafeGetStorageImpl(), tensor);
    return view;
  }

  at::Tensor back(const at::Tensor& result) const {
    if (!result.defined() || on_npu(result)) return result;
    auto original = originals_.find(result.storage().unsafeGetStorageImpl());
    if (original == originals_.end()) return copy(result);
    const at::Tensor& source = original->second;
    bool is_same = source.sizes() == result.sizes() && source.strides() == result.strides() &&
                   source.storage_offset() == result.storage_offset();
    return is_same ? source : source.as_strided(result.sizes(), result.strides(), result.storage_offset());
  }

  at::Tensor copy(const at::Tensor& result) const {
    at::Tensor dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
    at::Tensor target = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(device()));
    if (dense.numel()) std::memcpy(target.mutable_data_ptr(), dense.const_data_ptr(), dense.nbytes());
    return target;
  }

  void use(c10::Device device) { if (!device_) device_ = device; }

  c10::Device device() const {
    if (device_ && device_->has_index()) return *device_;
    return c10::impl::getDeviceGuardImpl(NPU)->getDevice();
  }

 private:
  std::unordered_map<c10::StorageImpl*, at::Tensor> originals_;
  std::optional<c10::Device> device_;
};

// A stream of random numbers that goes on as the NPU's generator does: by its seed and offset.
at::Generator cpu_generator(const std::optional<at::Generator>& given, c10::Device device) {
  at::Generator generator = given && given->defined() ? *given : at::globalContext().defaultGenerator(device);
  if (generator.device().type() == c10::kCPU) return generator;
  std::lock_guard<std::mutex> lock(generator.mutex());
  uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);
  uint64_t mixed = generator.current_seed() * 0x9E3779B97F4A7C15ull ^ (offset + 1) * 0xD1B54A32D192ED03ull;
  return at::detail::createCPUGenerator(mixed);
}

// ---- any operator

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

struct Call {
  const c10::FunctionSchema& schema;
  std::vector<c10::IValue> given;
  CpuView views;
  std::vector<std::pair<at::Tensor, at::Tensor>> resized;  // out= tensors that the kernel sizes: ours, the CPU's

  c10::IValue argument(size_t i) {
    const c10::IValue& value = given[i];
    const c10::Argument& declared = schema.arguments()[i];
    if (value.isTensor()) {
      const at::Tensor& tensor = value.toTensor();
      if (on_npu(tensor) && !is_written(declared)) check_dtype(schema.name(), tensor.scalar_type());
      if (on_npu(tensor) && declared.is_out() && tensor.numel() == 0) {
        views.use(tensor.device());
        resized.emplace_back(tensor, at::empty({0}, tensor.options().device(c10::kCPU)));
        return resized.back().second;
      }
      return views.of(tensor);
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(views.of(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<at::Tensor>(views.of(*tensor)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == NPU) {
      views.use(value.toDevice());
      return c10::Device(c10::kCPU);
    }
    if (declared.name() == "pin_memory") return {};
    return value;
  }

  bool wants_generator(size_t i) const {
    return given[i].isGenerator() ||
           (given[i].isNone() && schema.arguments()[i].type()->str().find("Generator") != std::string::npos);
  }

  at::Tensor result(const at::Tensor& tensor, size_t number) const {
    const auto* alias = schema.returns()[number].alias_info();
    if (alias && alias->isWrite())  // in place, or out=: what was given is handed back
      for (size_t i = 0; i < given.size(); i++) {
        const auto* written = schema.arguments()[i].alias_info();
        if (written && *written == *alias && given[i].isTensor()) return given[i].toTensor();
      }
    return views.back(tensor);
  }
};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto arguments = torch::jit::last(stack, schema.arguments().size());
  check_arguments(schema.name(), arguments);
  Call call{schema, std::vector<c10::IValue>(arguments.begin(), arguments.end()), {}, {}};
  size_t first = stack->size() - call.given.size();
  for (size_t i = 0; i < call.given.size(); i++) (*stack)[first + i] = call.argument(i);
  for (size_t i = 0; i < call.given.size(); i++)
    if (call.wants_generator(i))
      (*stack)[first + i] = cpu_generator(call.given[i].toOptional<at::Generator>(), call.views.device());

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [ours, theirs] : call.resized) {
    at::Tensor(ours).resize_(theirs.sizes());
    if (theirs.numel()) CpuView().of(ours).copy_(theirs);
  }
  size_t results = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); i++) {
    c10::IValue& value = (*stack)[results + i];
    if (value.isTensor()) {
      value = call.result(value.toTensor(), i);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(call.result(tensor, i));
      value = list;
    }
  }
}

// torch_npu has kernels of its own for some operators that torch composes of others (one_hot, where), which go past the
// dispatcher: torch's composition meets the kernels above.
void run_composition(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::AutogradCPU), stack);
}

// ---- operators that need more than that

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  if (to.is_same(from) || to.numel() == 0) return to;
  if (to.scalar_type() != from.scalar_type())
    for (const at::Tensor& tensor : {to, from})
      if (c10::isFloat8Type(tensor.scalar_type())) check_dtype("a cast", tensor.scalar_type());
  CpuView views;
  views.of(to).copy_(views.of(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::Tensor target = to;
  target.resize_(from.sizes());
  return copy_(target, from, false);
}

at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  at::Tensor target = at::empty_like(tensor, tensor.options().dtype(dtype));
  return copy_(target, tensor, false);
}

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p, std::optional<bool> train) {
  CpuView views;
  at::Tensor input = views.of(x), kept = at::ones_like(input, input.options().dtype(at::kBool));
  if (p == 0 || !train.value_or(true)) return {views.copy(input.clone()), views.copy(kept)};
  kept.bernoulli_(1 - p, cpu_generator(std::nullopt, x.device()));
  return {views.copy(p < 1 ? input.mul(kept).mul_(1 / (1 - p)) : at::zeros_like(input)), views.copy(kept)};
}

// ---- registration

// Memory, shapes and random state stay torch_npu's own; so does scaled_dot_product_attention, which calls its kernel.
const std::set<std::string> kept = {
    "empty.memory_format", "empty_strided", "empty_like", "empty_with_format", "empty_with_swapped_memory",
    "unsafe_empty_with_format", "new_empty_strided", "as_strided", "as_strided_", "view", "_reshape_alias", "unfold",
    "squeeze", "squeeze.dim", "unsqueeze", "view_as_real", "view_as_complex", "resize_", "resize_as_", "record_stream",
    "is_pinned", "_pin_memory", "is_set_to", "get_storage_size", "copy_memory_", "_lazy_clone", "_local_scalar_dense",
    "_fused_sdp_choice", "scaled_dot_product_attention", "flatten_dense_tensors", "set_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "_to_copy"};
const std::set<std::string> kept_for_autograd = {
    "scaled_dot_product_attention", "l1_loss", "kl_div", "cdist", "repeat_interleave.self_Tensor",
    "repeat_interleave.self_int", "stft", "inverse"};

std::string full_name(const c10::OperatorName& name) {
  return name.name.substr(name.name.find("::") + 2) + (name.overload_name.empty() ? "" : "." + name.overload_name);
}

std::vector<std::unique_ptr<torch::Library>> libraries;
torch::Library& library(const char* name, c10::DispatchKey key) {
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, name, key, __FILE__, __LINE__));
  return *libraries.back();
}

auto registered(c10::DispatchKey key) {
  std::vector<c10::OperatorName> names;
  for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(key))
    if (name.getNamespace() == "aten") names.push_back(name);
  return names;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) void install_kernels() {
  auto& kernels = library("aten", c10::DispatchKey::PrivateUse1);
  for (const auto& op : registered(c10::DispatchKey::PrivateUse1)) {
    std::string name = full_name(op);
    if (kept.count(name) || name.find("npu_") != std::string::npos) continue;
    if (name == "copy_") kernels.impl("copy_", TORCH_FN(copy_));
    else if (name == "_copy_from_and_resize") kernels.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
    else if (name == "native_dropout") kernels.impl("native_dropout", TORCH_FN(native_dropout));
    else kernels.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
  for (const char* space : {"npu", "aten"}) {
    auto op = c10::Dispatcher::singleton().findOp({std::string(space) + "::_npu_dtype_cast", ""});
    if (op && op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1))
      library(space, c10::DispatchKey::PrivateUse1).impl("_npu_dtype_cast", TORCH_FN(cast));
  }
  auto& compositions = library("aten", c10::DispatchKey::AutogradPrivateUse1);
  for (const auto& name : registered(c10::DispatchKey::AutogradPrivateUse1)) {
    auto op = c10::Dispatcher::singleton().findOp(name);
    bool is_composed = op && op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
    if (is_composed && !kept_for_autograd.count(full_name(name)))
      compositions.impl(full_name(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_composition>());
  }
}
