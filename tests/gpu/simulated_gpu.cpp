// A CUDA device in host memory, for a torch that was built without CUDA: its tensors are ordinary ones that say
// cuda:0, and every operator on them is the CPU's, over the same memory. So it refuses what a GPU refuses, tensors of
// two devices in one operator, and it knows what would have to wait for a GPU.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cmath>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::IValue, c10::Storage, c10::StorageImpl;

const Device kGpu(DeviceType::CUDA, 0), kHost(DeviceType::CPU);

// ------------------------------------------------------------------ memory, device, streams

c10::DataPtr as_memory_of(Device device, c10::DataPtr&& from) {
  auto deleter = from.get_deleter();
  void* data = from.get();
  return {data, from.release_context(), deleter, device};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return as_memory_of(kGpu, c10::GetCPUAllocator()->allocate(bytes)); }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(DeviceType::CUDA, &memory)

// Pinned memory is the host's, remembered: where it begins, and its bytes.
std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes ? bytes : 1);
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<char*>(data)] = bytes ? bytes : 1;
    return {data, data, &Pinned::free, kHost};
  }
  static void free(void* data) {
    {
      std::lock_guard<std::mutex> lock(pinned_lock);
      pinned.erase(static_cast<char*>(data));
    }
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Pinned::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  static bool has(const void* data) {
    std::lock_guard<std::mutex> lock(pinned_lock);
    auto after = pinned.upper_bound(static_cast<const char*>(data));
    if (after == pinned.begin()) return false;
    auto found = std::prev(after);
    return data < found->first + found->second;
  }
};
Pinned pinned_memory;

// One device with one stream, on which everything is done as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// The name is the one that torch looks for, and before its first look this library has to be there.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return Pinned::has(data); }
  at::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

// ------------------------------------------------------------------ what waits for a GPU

void (*on_wait)(const char*) = nullptr;

bool of_the_host(const at::Tensor& t) { return t.defined() && !t.is_cuda(); }

// Whether a GPU would have to be waited for, here or inside the operator's own kernel for it.
bool waits(const std::string& name, const std::vector<IValue>& given) {
  static const std::set<std::string> always{  // numbers, or how many there are; a mask that indexes asks nonzero
      "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique",
      "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::is_nonzero",
      "aten::multinomial", "aten::histc"};
  if (always.count(name)) return true;
  if (name == "aten::copy_") {  // between the host and a GPU, or pageable memory on the way
    const at::Tensor &to = given[0].toTensor(), &from = given[1].toTensor();
    if (to.is_cuda() == from.is_cuda()) return false;
    return !given[2].toBool() || !Pinned::has((to.is_cuda() ? from : to).data_ptr());
  }
  if (name == "aten::repeat_interleave") return given.back().isNone();  // without the size of the result
  if (name == "aten::isin" && given[0].isTensor() && given[1].isTensor()) {  // sorts many, and looks which are twice
    const double few = 10 * std::pow(given[0].toTensor().numel(), 0.145);
    return given[1].toTensor().numel() >= few && !given[2].toBool();
  }
  if (name == "aten::index_put_" || name == "aten::_index_put_impl_") {
    const at::Tensor& values = given[2].toTensor();
    bool masks = true, brought = false;
    for (const auto& index : given[1].toOptionalTensorVector()) {
      if (!index || !index->defined()) continue;
      masks &= index->dtype() == at::kBool || index->dtype() == at::kByte;
      brought |= of_the_host(*index);
    }
    if (masks && values.numel() == 1) return brought;  // a mask that is filled
    return masks || brought || of_the_host(values);
  }
  return false;
}

// ------------------------------------------------------------------ operators

// One call: tensors of the host over the device's memory go in, and tensors of the device come out.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const std::string& name = op_.schema().name();
    const size_t first = stack_.size() - arguments.size();
    const std::vector<IValue> given(stack_.begin() + first, stack_.end());
    if (name != "aten::copy_")
      for (size_t i = 0; i < given.size(); i++) check(arguments[i], given[i]);
    if (on_wait && waits(name, given)) on_wait(name.c_str());
    for (size_t i = 0; i < given.size(); i++) stack_[first + i] = to_host(given[i]);
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    const size_t results = op_.schema().returns().size();
    for (size_t i = stack_.size() - results; i < stack_.size(); i++) stack_[i] = to_device(stack_[i]);
    settle();
  }

 private:
  struct Pair {
    at::Tensor device, host;
  };

  template <typename Each>
  static IValue mapped(const IValue& value, Each each) {
    if (value.isTensor()) return each(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(each(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional(each(*t)) : t);
      return list;
    }
    return value;
  }

  // Other tensors have to be the device's, as for a GPU: but numbers that are read, and what indexes.
  void check(const c10::Argument& argument, const IValue& value) {
    const std::string& name = op_.schema().name();
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    const bool indexes = argument.name() == "indices" && name.find("index") != std::string::npos;
    TORCH_CHECK(!value.isDevice() || !value.toDevice().is_cuda() || value.toDevice().index() <= 0, "invalid device ordinal");
    TORCH_CHECK(!value.isGenerator() || !value.toGenerator().defined(), "Expected a 'cuda' device type for generator but found 'cpu'");
    // These take a number of the host neither.
    static const std::set<std::string> strict{
        "aten::index_select", "aten::gather", "aten::take", "aten::searchsorted", "aten::embedding", "aten::index_add",
        "aten::index_copy", "aten::scatter", "aten::nll_loss_forward", "aten::_fused_adamw_", "aten::_fused_adam_"};
    const std::string plain = name.back() == '_' && !strict.count(name) ? name.substr(0, name.size() - 1) : name;
    const bool number = !strict.count(plain) && !written;
    mapped(value, [&](const at::Tensor& t) {
      TORCH_CHECK(!t.defined() || t.is_cuda() || indexes || (t.dim() == 0 && number),
                  "Expected all tensors to be on the same device, but '", argument.name(), "' of ", name, ", of shape ", t.sizes(),
                  ", is on ", t.device(), " and another on cuda:0");
      return t;
    });
  }

  static at::Tensor over(const Storage& storage, c10::DispatchKey key, const at::Tensor& t) {
    return shaped(at::detail::make_tensor<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), t.dtype()), t);
  }

  static at::Tensor shaped(at::Tensor made, const at::Tensor& t) {
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) made._set_conj(true);
    if (t.is_neg()) made._set_neg(true);
    return made;
  }

  Storage host_storage(const Storage& storage) {
    auto [found, is_new] = hosts_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) {
      c10::DataPtr borrowed(storage.unsafeGetStorageImpl()->mutable_data(), kHost);
      found->second = Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(borrowed), c10::GetCPUAllocator(), true);
      devices_.emplace(found->second.unsafeGetStorageImpl(), storage);
    }
    return found->second;
  }

  IValue to_host(const IValue& value) {
    if (value.isDevice()) return value.toDevice().is_cuda() ? kHost : value.toDevice();
    if (value.isStorage()) return value.toStorage().device().is_cuda() ? host_storage(value.toStorage()) : value.toStorage();
    return mapped(value, [&](const at::Tensor& t) {
      if (!t.defined()) return t;
      if (!t.is_cuda()) {
        of_the_host_.insert(t.unsafeGetTensorImpl());
        return t;
      }
      for (const Pair& pair : pairs_)
        if (pair.device.is_same(t)) return pair.host;
      pairs_.push_back({t, over(host_storage(t.storage()), c10::DispatchKey::CPU, t)});
      return pairs_.back().host;
    });
  }

  IValue to_device(const IValue& value) {
    return mapped(value, [&](const at::Tensor& t) {
      if (!t.defined() || t.is_cuda() || of_the_host_.count(t.unsafeGetTensorImpl())) return t;
      for (const Pair& pair : pairs_)
        if (pair.host.is_same(t)) return pair.device;  // written in place
      StorageImpl* storage = t.storage().unsafeGetStorageImpl();
      for (const Pair& pair : pairs_)
        if (pair.host.storage().unsafeGetStorageImpl() == storage) {  // in inference mode too it is what its base is
          const c10::DispatchKeySet keys = pair.device.key_set();
          return shaped(at::detail::make_tensor<c10::TensorImpl>(
              c10::TensorImpl::VIEW, Storage(pair.device.storage()), keys, t.dtype()), t);
        }
      auto found = devices_.find(storage);
      if (found == devices_.end()) {
        results_.push_back(t);  // no other storage may come to lie where this one does
        const size_t bytes = storage->nbytes();
        auto taken = as_memory_of(kGpu, storage->set_data_ptr(c10::DataPtr(nullptr, kHost)));
        found = devices_.emplace(storage, Storage(Storage::use_byte_size_t(), bytes, std::move(taken), &memory, true)).first;
      }
      return over(found->second, c10::DispatchKey::CUDA, t);
    });
  }

  // What the operator resized, or gave another storage, has that on the device too.
  void settle() {
    for (const Pair& pair : pairs_) {
      StorageImpl* host = pair.host.storage().unsafeGetStorageImpl();
      auto found = devices_.find(host);
      TORCH_CHECK(found != devices_.end(), op_.schema().name(), " gave a tensor memory that is not the device's");
      StorageImpl* device = found->second.unsafeGetStorageImpl();
      if (host->data_ptr().get_deleter() != c10::detail::deleteNothing && host->data()) {
        device->set_data_ptr_noswap(as_memory_of(kGpu, host->set_data_ptr(c10::DataPtr(nullptr, kHost))));
        device->set_nbytes(host->nbytes());
      }
      c10::TensorImpl* impl = pair.device.unsafeGetTensorImpl();
      if (device != pair.device.storage().unsafeGetStorageImpl()) impl->set_storage_keep_dtype(found->second);
      if (pair.host.sizes() != pair.device.sizes() || pair.host.strides() != pair.device.strides() ||
          pair.host.storage_offset() != pair.device.storage_offset())
        impl->set_sizes_and_strides(pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::vector<Pair> pairs_;
  std::vector<at::Tensor> results_;
  std::unordered_map<StorageImpl*, Storage> hosts_, devices_;
  std::unordered_set<c10::TensorImpl*> of_the_host_;
};

void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, *stack).run(); }

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&call>()); }

// It has a kernel for every device, which looks for a part that only CUDA's build has.
TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&call>()); }

// `callback` is called with the operator's name whenever one would wait for a GPU, and has to be kept alive.
extern "C" void simulated_gpu_on_wait(void (*callback)(const char*)) { on_wait = callback; }
