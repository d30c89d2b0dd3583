// ONNX Runtime custom ops over the kernels: domain `edgeattn`, ops CascadedGroupAttention and QCascadedGroupAttention,
// each also as <name>_num_heads<k>. Compiled against any ONNX Runtime headers from API level 21 on, runs in newer ones.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "c_api.h"
#include "cga_inputs.h"
#include "kernels/cga.h"

namespace {

using edgeattn::CgaAttributes;
using edgeattn::Dims;

constexpr const char* kVersion = "1";  // of the op's contract; nodes carry it as plugin_version
constexpr int kMaxAliasHeads = 16;

// No exception may cross into the runtime.
template <typename Body>
OrtStatus* guarded(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::invalid_argument& error) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  }
}

void check_node(const CgaAttributes& attributes, int alias_heads) {
  edgeattn::check_attributes(attributes);
  if (alias_heads != 0 && attributes.num_heads != alias_heads) {
    throw std::invalid_argument("CascadedGroupAttention: num_heads is " + std::to_string(attributes.num_heads) +
                                " in a node of type ..._num_heads" + std::to_string(alias_heads) +
                                "; they must agree.");
  }
}

std::vector<std::int64_t> two(std::vector<std::int64_t> window) {
  if (window.size() != 2) {
    throw std::invalid_argument("CascadedGroupAttention: window has " + std::to_string(window.size()) +
                                " values, expected 2 (height, width).");
  }
  return window;
}

CgaAttributes read_attributes(const Ort::ConstKernelInfo& info) {
  const auto window = two(info.GetAttributes<std::int64_t>("window"));
  return {info.GetAttribute<std::int64_t>("num_heads"), info.GetAttribute<std::int64_t>("key_dim"), window[0],
          window[1], info.GetAttribute<float>("scale")};
}

void check_version(const Ort::ConstKernelInfo& info) {
  std::string version = kVersion;
  try {
    version = info.GetAttribute<std::string>("plugin_version");
  } catch (const Ort::Exception&) {  // absent: written by hand
  }
  if (version != kVersion) {
    throw std::invalid_argument("CascadedGroupAttention: the model has plugin_version \"" + version +
                                "\", this plugin is \"" + kVersion +
                                "\"; export the model again or install the edgeattn that wrote it.");
  }
}

// Float tensors of one node in the order of CgaTensors, dequantized where they are int8.
struct FloatInputs {
  std::vector<Dims> shapes;
  std::vector<std::vector<float>> owned;
  std::vector<const float*> data;

  // `inputs` without x; their shapes are checked.
  FloatInputs(bool quantized, const CgaAttributes& attributes, const Dims& x,
              const std::vector<Ort::ConstValue>& inputs) {
    shapes.push_back(x);
    for (const auto& input : inputs) shapes.push_back(input.GetTensorTypeAndShapeInfo().GetShape());
    edgeattn::check_shapes(quantized, attributes, shapes);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (!edgeattn::is_int8_input(quantized, i + 1)) {
        data.push_back(inputs[i].GetTensorData<float>());
        continue;
      }
      dequantize(inputs[i], inputs[i + 1]);
      ++i;
    }
  }

  void dequantize(const Ort::ConstValue& weight, const Ort::ConstValue& scale) {
    const auto info = weight.GetTensorTypeAndShapeInfo();
    const std::size_t count = info.GetElementCount(), rows = info.GetShape()[0],
                      row = count / std::max<std::size_t>(rows, 1);
    const auto* from = weight.GetTensorData<std::int8_t>();
    const auto* factor = scale.GetTensorData<float>();
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = float(from[i]) * factor[i / row];
    data.push_back(values.data());
    owned.push_back(std::move(values));
  }
};

void run_in_session_pool(void* context, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
  Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(task, count, 0, argument);
}

class CgaKernel {
 public:
  CgaKernel(const Ort::ConstKernelInfo& info, bool quantized, int alias_heads)
      : quantized_(quantized), isa_(edgeattn::active_isa()), attributes_(read_attributes(info)) {
    check_version(info);
    check_node(attributes_, alias_heads);
    std::vector<Ort::ConstValue> inputs;
    for (std::size_t i = 1; i < edgeattn::input_names(quantized).size(); ++i) {
      int is_constant = 0;
      const Ort::ConstValue value = info.GetTensorConstantInput(i, &is_constant);
      if (!is_constant) return;  // packed at every run instead
      inputs.push_back(value);
    }
    constant_ = pack(info.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape(), inputs);
  }

  OrtStatus* ComputeV2(OrtKernelContext* context) {
    return guarded([&] { compute(context); });
  }

 private:
  std::unique_ptr<edgeattn::CgaWeights> pack(const Dims& x, const std::vector<Ort::ConstValue>& inputs) const {
    const FloatInputs floats(quantized_, attributes_, x, inputs);
    const auto& names = edgeattn::input_names(quantized_);
    const std::size_t dw = std::find(names.begin(), names.end(), "dw_weight") - names.begin();
    const auto& d = floats.data;
    return std::make_unique<edgeattn::CgaWeights>(
        edgeattn::CgaShape{int(floats.shapes.back()[0]), int(attributes_.num_heads), int(attributes_.key_dim),
                           int(floats.shapes[dw].back()), int(attributes_.window_height), int(attributes_.window_width),
                           attributes_.scale},
        edgeattn::CgaTensors{d[0], d[1], d[2], d[3], d[4], d[5], d[6]});
  }

  void compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const Ort::ConstValue x = context.GetInput(0);
    const Dims dims = x.GetTensorTypeAndShapeInfo().GetShape();
    const auto packed = constant_ ? nullptr : pack_inputs(context, dims);
    const edgeattn::CgaWeights& weights = constant_ ? *constant_ : *packed;
    if (dims.size() != 4 || dims[1] != weights.shape().channels) {
      std::vector<Dims> shapes(edgeattn::input_names(quantized_).size());
      shapes.front() = dims;
      shapes.back() = {weights.shape().channels};
      edgeattn::check_shapes(quantized_, attributes_, shapes);
    }
    float* y = context.GetOutput(0, dims).GetTensorMutableData<float>();
    // The session's thread count is not told. More shares than eight only cost when there are fewer threads.
    const int width = std::clamp(int(std::thread::hardware_concurrency()), 1, 8);
    auto scratch = scratches_.take();
    edgeattn::cga_forward(isa_, weights, x.GetTensorData<float>(), y, {int(dims[0]), int(dims[2]), int(dims[3])},
                          *scratch, {run_in_session_pool, raw, width});
    scratches_.give_back(std::move(scratch));
  }

  std::unique_ptr<edgeattn::CgaWeights> pack_inputs(const Ort::KernelContext& context, const Dims& x) const {
    std::vector<Ort::ConstValue> inputs;
    for (std::size_t i = 1; i < context.GetInputCount(); ++i) inputs.push_back(context.GetInput(i));
    return pack(x, inputs);
  }

  const bool quantized_;
  const edgeattn::Isa isa_;
  const CgaAttributes attributes_;
  std::unique_ptr<edgeattn::CgaWeights> constant_;
  edgeattn::ScratchPool scratches_;
};

// Ort::ShapeInferContext::SetOutputShape of these headers writes -2 for a symbolic size, which newer runtimes refuse.
void set_output_shape(OrtShapeInferContext* context, const Ort::ShapeInferContext::Shape& shape) {
  const OrtApi& api = Ort::GetApi();
  std::vector<std::int64_t> sizes;
  std::vector<const char*> symbols;
  for (const auto& dim : shape) {
    sizes.push_back(dim.IsInt() ? dim.AsInt() : -1);
    symbols.push_back(dim.IsInt() ? "" : dim.AsSym());
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info(raw);
  Ort::ThrowOnError(api.SetTensorElementType(raw, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
  Ort::ThrowOnError(api.SetDimensions(raw, sizes.data(), sizes.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(raw, symbols.data(), symbols.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, 0, raw));
}

class CgaOp : public Ort::CustomOpBase<CgaOp, CgaKernel, true> {
 public:
  // `alias_heads` 0: the plain name, any number of heads.
  CgaOp(bool quantized, int alias_heads)
      : name_(std::string(quantized ? "Q" : "") + "CascadedGroupAttention" +
              (alias_heads ? "_num_heads" + std::to_string(alias_heads) : "")),
        quantized_(quantized),
        alias_heads_(alias_heads) {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) -> OrtStatusPtr {
      return guarded([&] { static_cast<const CgaOp*>(self)->infer(context); });
    };
  }

  OrtStatus* CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new CgaKernel(Ort::ConstKernelInfo(info), quantized_, alias_heads_); });
  }
  const char* GetName() const { return name_.c_str(); }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  std::size_t GetInputTypeCount() const { return edgeattn::input_names(quantized_).size(); }
  std::size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(std::size_t index) const {
    return edgeattn::is_int8_input(quantized_, index) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
                                                      : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

 private:
  // The runtime ignores a failure here (1.31); the kernel repeats the checks when it is made.
  void infer(OrtShapeInferContext* raw) const {
    Ort::ShapeInferContext context(&Ort::GetApi(), raw);
    const auto window = two(context.GetAttrInts("window"));
    const CgaAttributes attributes{context.GetAttrInt("num_heads"), context.GetAttrInt("key_dim"), window[0], window[1],
                                   1.0f};
    check_node(attributes, alias_heads_);
    std::vector<Dims> shapes;
    for (std::size_t i = 0; i < context.GetInputCount(); ++i) {
      shapes.emplace_back();
      for (const auto& dim : context.GetInputShape(i)) shapes.back().push_back(dim.IsInt() ? dim.AsInt() : -1);
    }
    edgeattn::check_shapes(quantized_, attributes, shapes);
    const auto& x = context.GetInputShape(0);
    if (!x.empty()) set_output_shape(raw, x);
  }

  const std::string name_;
  const bool quantized_;
  const int alias_heads_;
};

// Never freed: at process exit the runtime may go first.
const Ort::CustomOpDomain& domain() {
  static const Ort::CustomOpDomain* const built = [] {
    auto* fresh = new Ort::CustomOpDomain("edgeattn");
    for (bool quantized : {false, true}) {
      for (int heads = 0; heads <= kMaxAliasHeads; ++heads) fresh->Add(new CgaOp(quantized, heads));
    }
    return fresh;
  }();
  return *built;
}

}  // namespace

extern "C" {

// The API level of the headers; a runtime must offer at least this one.
EDGEATTN_EXPORT int edgeattn_ort_api_version(void) { return ORT_API_VERSION; }

EDGEATTN_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const std::string message = "edgeattn: the plugin needs ONNX Runtime API level " + std::to_string(ORT_API_VERSION) +
                                ", this runtime is " + base->GetVersionString() + "; install a newer onnxruntime.";
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  Ort::InitApi(api);
  return guarded([&] {
    edgeattn::active_isa();
    Ort::UnownedSessionOptions(options).Add(domain());
  });
}

}  // extern "C"
