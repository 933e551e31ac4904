#include "model_run.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace louver::bench {
namespace {

constexpr int kBatch = 2048;
constexpr int kRoom = 512;  // for steps behind the depth

RuntimeConfig first_config(const Options & options, int n_ctx) {
    RuntimeConfig config;
    config.decode.epsilon = options.epsilon;
    config.decode.check = options.check;
    config.min_context_gpu = options.min_context;
    config.n_ctx = n_ctx;
    return config;
}

int context_size(const Options & options) { return (options.depth + kRoom + 255) / 256 * 256; }

ggml_type cache_type(const std::string & name) {
    for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0}) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    throw std::runtime_error("--cache is " + name + ", accepted are f16, bf16, q8_0");
}

std::string content_of(const std::string & path) {
    std::ifstream file(path);
    if (!file) {
        throw std::runtime_error(path + ": cannot be read");
    }
    std::stringstream all;
    all << file.rdbuf();
    return all.str();
}

}  // namespace

ModelRun::ModelRun(const Options & options)
    : runtime(first_config(options, context_size(options))),
      config(first_config(options, context_size(options))),
      options_(options),
      model_(nullptr, llama_model_free),
      context_(nullptr, llama_free),
      n_texts_((options.depth + options.window - 1) / options.window),
      per_text_(options.depth / n_texts_) {
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 999;
    model_.reset(llama_model_load_from_file(options.model.c_str(), model_params));
    if (model_ == nullptr) {
        throw std::runtime_error(options.model + ": llama.cpp cannot load it");
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(context_size(options));
    params.n_batch = kBatch;
    params.n_ubatch = kBatch;
    params.n_seq_max = static_cast<uint32_t>(n_texts_ + 1);
    params.kv_unified = true;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = params.type_v = cache_type(options.cache);
    context_.reset(llama_init_from_model(model_.get(), params));
    if (context_ == nullptr) {
        throw std::runtime_error("llama.cpp cannot make a context of " + std::to_string(params.n_ctx) + " cells");
    }
    const std::string text = content_of(options.text);
    const llama_vocab * vocab = llama_model_get_vocab(model_.get());
    tokens_.resize(text.size() + 8);
    tokens_.resize(static_cast<size_t>(llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), tokens_.data(),
                                                      static_cast<int32_t>(tokens_.size()), false, false)));
    if (tokens_.size() < static_cast<size_t>(options.depth + kRoom)) {
        throw std::runtime_error(options.text + " has " + std::to_string(tokens_.size()) + " tokens, needed are " +
                                 std::to_string(options.depth + kRoom));
    }
    fill();
}

int ModelRun::n_vocab() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_.get())); }
int ModelRun::n_layer() const { return llama_model_n_layer(model_.get()); }

void ModelRun::enable(bool enabled) {
    config.enabled = enabled;
    runtime.configure(config);
}

void ModelRun::decode(const llama_token * tokens, int n, int position, llama_seq_id sequence, bool wants_logits) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i] = tokens[i];
        batch.pos[i] = position + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = wants_logits && i == n - 1 ? 1 : 0;
    }
    runtime.enter();
    const int status = llama_decode(context_.get(), batch);
    runtime.exit();
    llama_batch_free(batch);
    if (status != 0) {
        throw std::runtime_error("llama_decode returned " + std::to_string(status));
    }
}

void ModelRun::fill() {
    const llama_memory_t memory = llama_get_memory(context_.get());
    for (int text = 0; text < n_texts_; ++text) {
        enable(text % 2 == 0);
        const auto start = std::chrono::steady_clock::now();
        const int n = text + 1 < n_texts_ ? per_text_ : options_.depth - per_text_ * (n_texts_ - 1);
        for (int first = 0; first < n; first += kBatch) {
            decode(tokens_.data() + text * per_text_ + first, std::min(kBatch, n - first), first, text + 1, false);
        }
        llama_synchronize(context_.get());
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        (text % 2 == 0 ? fill_with_ : fill_without_).push_back(seconds.count());
        llama_memory_seq_cp(memory, text + 1, 0, -1, -1);
        std::fprintf(stderr, "\rfilled %d of %d texts", text + 1, n_texts_);
    }
    std::fprintf(stderr, "\n");
    enable(true);
}

const float * ModelRun::step(int n) {
    const llama_token token = tokens_[static_cast<size_t>(options_.depth + n)];
    const llama_pos last = llama_memory_seq_pos_max(llama_get_memory(context_.get()), 0);
    decode(&token, 1, last + 1, 0, true);
    return llama_get_logits(context_.get());  // waits until they are there
}

void ModelRun::rewind() {
    const int longest = std::max(per_text_, options_.depth - per_text_ * (n_texts_ - 1));
    llama_memory_seq_rm(llama_get_memory(context_.get()), 0, longest, -1);
}

}  // namespace louver::bench
