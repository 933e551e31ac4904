// A model on the GPU whose context is filled with texts: real keys at any depth, from a model trained for a shorter one.
//
// The texts are decoded as sequences of their own, each from position 0 on, into one unified cache; then one more sequence is
// given the cells of all of them, and goes on behind them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llama.h"
#include "louver/runtime.h"

namespace louver::bench {

struct Options {
    std::string model;
    std::string text;
    std::string logits;  // file: written if there is none, else what quality is measured against
    std::string cache = "f16";
    int depth = 32768;
    int window = 7680;  // tokens to a text, at most
    int n_steps = 32;
    int n_rounds = 5;
    int min_context = 0;  // LouverConfig::min_context_gpu; the layers are to be measured at any depth
    double epsilon = 0.05;
    bool layers = true;
    bool check = false;
    int n_random = 0;  // layers of random keys, in place of a model
};

class ModelRun {
  public:
    explicit ModelRun(const Options & options);

    // Decodes one more token behind the depth; 0 is the first. Returns its logits.
    const float * step(int n);
    // Back to the depth.
    void rewind();

    int n_texts() const { return n_texts_; }
    int n_vocab() const;
    int n_layer() const;
    // Seconds to a text, of the filling: with Louver and without, in turn.
    const std::vector<double> & fill_with() const { return fill_with_; }
    const std::vector<double> & fill_without() const { return fill_without_; }

    Runtime runtime;
    void enable(bool enabled);
    RuntimeConfig config;

  private:
    void decode(const llama_token * tokens, int n, int position, llama_seq_id sequence, bool wants_logits);
    void fill();

    const Options & options_;
    std::unique_ptr<llama_model, decltype(&llama_model_free)> model_;
    std::unique_ptr<llama_context, decltype(&llama_free)> context_;
    std::vector<llama_token> tokens_;
    int n_texts_;
    int per_text_;
    std::vector<double> fill_with_;
    std::vector<double> fill_without_;
};

}  // namespace louver::bench
