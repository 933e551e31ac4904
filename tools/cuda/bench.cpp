// louver_cuda_bench: Louver beside stock llama.cpp on one GPU, in one process, in turn (docs/cuda.md).
#include <cuda_profiler_api.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>

#include "captured.h"
#include "model_run.h"
#include "phases.h"
#include "random_ops.h"

namespace louver::bench {
namespace {

constexpr const char * kHelp =
    "louver_cuda_bench --model FILE --text FILE [options]\n"
    "louver_cuda_bench --random N [--depth N] [--epsilon X]   our kernels alone, on N layers of random keys\n"
    "  --depth N         tokens in the cache (32768)\n"
    "  --window N        tokens to a text of its own, at most: what the model was trained for (7680)\n"
    "  --epsilon X       (0.05)\n"
    "  --cache TYPE      f16, bf16 or q8_0 (f16)\n"
    "  --min-context N   cells below which stock runs (0)\n"
    "  --steps N         tokens to a measurement and for the quality (32)\n"
    "  --rounds N        measurements of each contender, in turn (5)\n"
    "  --logits FILE     stock's logits: written if the file does not exist, else the reference of the quality\n"
    "  --no-layers       the whole model only\n"
    "  --check           the quality alone, with every step compared with brute force\n";

Options parse(int argc, char ** argv) {
    Options options;
    const std::map<std::string, std::string *> texts = {
        {"--model", &options.model}, {"--text", &options.text}, {"--cache", &options.cache}, {"--logits", &options.logits}};
    const std::map<std::string, int *> numbers = {
        {"--depth", &options.depth},     {"--window", &options.window},           {"--steps", &options.n_steps},
        {"--rounds", &options.n_rounds}, {"--min-context", &options.min_context}, {"--random", &options.n_random}};
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (name == "--help" || name == "-h") {
            std::fputs(kHelp, stdout);
            std::exit(0);
        }
        if (name == "--no-layers") {
            options.layers = false;
            continue;
        }
        if (name == "--check") {
            options.check = true;
            continue;
        }
        if (i + 1 == argc) {
            throw std::runtime_error(name + " is not an option, or lacks its value\n" + kHelp);
        }
        const std::string value = argv[++i];
        if (const auto text = texts.find(name); text != texts.end()) {
            *text->second = value;
        } else if (const auto number = numbers.find(name); number != numbers.end()) {
            const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), *number->second);
            if (error != std::errc{} || end != value.data() + value.size() || *number->second < 0) {
                throw std::runtime_error(name + " is " + value + ", accepted are whole numbers");
            }
        } else if (name == "--epsilon") {
            options.epsilon = std::strtod(value.c_str(), nullptr);
        } else {
            throw std::runtime_error(name + " is not an option\n" + kHelp);
        }
    }
    if (options.n_random == 0 && (options.model.empty() || options.text.empty())) {
        throw std::runtime_error(std::string("--model and --text are needed, or --random\n") + kHelp);
    }
    return options;
}

double seconds_of(const std::function<void()> & work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string spread(const std::vector<double> & values, double unit) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    char text[96];
    std::snprintf(text, sizeof(text), "%.2f (%.2f to %.2f)", median(values) * unit, *low * unit, *high * unit);
    return text;
}

std::vector<double> ratios(const std::vector<double> & a, const std::vector<double> & b) {
    std::vector<double> all;
    for (size_t i = 0; i < a.size(); ++i) {
        all.push_back(a[i] / b[i]);
    }
    return all;
}

void measure_layers(ModelRun & model, const std::vector<CapturedOp> & ops, int64_t n_kv, const Options & options) {
    LayerGraph graph(ops, n_kv);
    std::vector<double> stock;
    std::vector<double> ours;
    const int n_runs = 10;
    std::vector<std::vector<float>> dense;
    double furthest = 0;
    for (int round = 0; round <= options.n_rounds; ++round) {
        for (const bool enabled : {false, true}) {
            model.enable(enabled);
            graph.run(4);  // until it is captured
            const double seconds = seconds_of([&] { graph.run(n_runs); });
            if (round > 0) {
                (enabled ? ours : stock).push_back(seconds / n_runs / graph.n_layer());
            }
            for (int layer = 0; layer < graph.n_layer(); ++layer) {
                const std::vector<float> output = graph.output(layer);
                if (!enabled) {
                    dense.resize(static_cast<size_t>(graph.n_layer()));
                    dense[static_cast<size_t>(layer)] = output;
                    continue;
                }
                double off = 0;
                double length = 0;
                for (size_t c = 0; c < output.size(); ++c) {
                    const double d = static_cast<double>(output[c]) - static_cast<double>(dense[static_cast<size_t>(layer)][c]);
                    off += d * d;
                    length += static_cast<double>(dense[static_cast<size_t>(layer)][c]) *
                              static_cast<double>(dense[static_cast<size_t>(layer)][c]);
                }
                furthest = std::max(furthest, std::sqrt(off / length));
            }
        }
    }
    std::printf(
        "attention of a layer, %lld keys: stock %s us, louver %s us, ratio %s; outputs differ by up to %.3f of their length\n",
        static_cast<long long>(n_kv), spread(stock, 1e6).c_str(), spread(ours, 1e6).c_str(),
        spread(ratios(stock, ours), 1).c_str(), furthest);
    std::fflush(stdout);
}

void print_phases(const Phases & phases, int64_t n_kv, double copy) {
    std::printf(
        "our kernels alone, %lld keys: %.1f us a layer; its scan, as a kernel of its own, %.1f us for %.1f MB, %.0f %% of the "
        "copy "
        "bandwidth of %.0f GB/s; survivors %.2f %%; index %.1f %% of the cache, built in %.0f us\n",
        static_cast<long long>(n_kv), phases.step_microseconds, phases.scan_microseconds, phases.scan_bytes * 1e-6,
        100 * phases.scan_bytes / (phases.scan_microseconds * 1e-6) / copy, copy * 1e-9, 100 * phases.survivors,
        100 * phases.index_share, phases.build_microseconds);
    std::fflush(stdout);
}

struct Distance {
    double kl = 0;
    double kl_most = 0;
    double same_top = 0;
};

Distance distance_of(const std::vector<float> & reference, const std::vector<float> & logits, int n_vocab) {
    Distance distance;
    const auto n_steps = static_cast<int>(reference.size()) / n_vocab;
    for (int step = 0; step < n_steps; ++step) {
        const float * r = &reference[static_cast<size_t>(step) * static_cast<size_t>(n_vocab)];
        const float * p = &logits[static_cast<size_t>(step) * static_cast<size_t>(n_vocab)];
        const float * r_top = std::max_element(r, r + n_vocab);
        const float * p_top = std::max_element(p, p + n_vocab);
        double r_sum = 0;
        double p_sum = 0;
        for (int i = 0; i < n_vocab; ++i) {
            r_sum += std::exp(static_cast<double>(r[i] - *r_top));
            p_sum += std::exp(static_cast<double>(p[i] - *p_top));
        }
        double kl = 0;
        for (int i = 0; i < n_vocab; ++i) {
            const double log_r = static_cast<double>(r[i] - *r_top) - std::log(r_sum);
            const double log_p = static_cast<double>(p[i] - *p_top) - std::log(p_sum);
            kl += std::exp(log_r) * (log_r - log_p);
        }
        distance.kl += kl / n_steps;
        distance.kl_most = std::max(distance.kl_most, kl);
        distance.same_top += (r_top - r == p_top - p ? 1.0 : 0.0) / n_steps;
    }
    return distance;
}

std::vector<float> logits_of(ModelRun & model, const Options & options, bool enabled) {
    model.enable(enabled);
    std::vector<float> all;
    for (int n = 0; n < options.n_steps; ++n) {
        const float * logits = model.step(n);
        all.insert(all.end(), logits, logits + model.n_vocab());
    }
    model.rewind();
    return all;
}

void measure_model(ModelRun & model, const Options & options) {
    std::vector<double> stock;
    std::vector<double> ours;
    for (int round = 0; round <= options.n_rounds; ++round) {
        for (const bool enabled : {false, true}) {
            model.enable(enabled);
            for (int n = 0; n < 6; ++n) {
                model.step(n);
            }
            const double seconds = seconds_of([&] {
                for (int n = 6; n < 6 + options.n_steps; ++n) {
                    model.step(n);
                }
            });
            model.rewind();
            if (round > 0) {
                (enabled ? ours : stock).push_back(seconds / options.n_steps);
            }
        }
    }
    std::printf("decode at %d tokens, %s cache: stock %.1f t/s, louver %.1f t/s, ratio %s\n", options.depth,
                options.cache.c_str(), 1 / median(stock), 1 / median(ours), spread(ratios(stock, ours), 1).c_str());
    std::fflush(stdout);
}

void measure_quality(ModelRun & model, const Options & options) {
    std::vector<float> reference = logits_of(model, options, false);
    const std::vector<float> stock = reference;
    if (!options.logits.empty()) {
        if (std::ifstream file(options.logits, std::ios::binary); file) {
            file.read(reinterpret_cast<char *>(reference.data()), static_cast<std::streamsize>(reference.size() * sizeof(float)));
        } else {
            std::ofstream(options.logits, std::ios::binary)
                .write(reinterpret_cast<const char *>(reference.data()),
                       static_cast<std::streamsize>(reference.size() * sizeof(float)));
        }
    }
    model.runtime.reset_stats();
    const Distance of_stock = distance_of(reference, stock, model.n_vocab());
    const Distance of_ours = distance_of(reference, logits_of(model, options, true), model.n_vocab());
    const Stats stats = model.runtime.stats();
    std::printf(
        "quality over %d steps against %s: louver KL %.2e (most %.2e), same top token %.3f; stock on this cache KL %.2e, %.3f\n",
        options.n_steps, options.logits.empty() ? "stock on this cache" : "stock in the file of logits", of_ours.kl,
        of_ours.kl_most, of_ours.same_top, of_stock.kl, of_stock.same_top);
    const double queries = std::max<double>(1, static_cast<double>(stats.n_queries));
    std::printf("paths: louver %lld, dense %lld, stock %lld;", static_cast<long long>(stats.attention[0]),
                static_cast<long long>(stats.attention[1]), static_cast<long long>(stats.attention[2]));
    for (size_t reason = 0; reason < stats.reasons[2].size(); ++reason) {
        if (stats.reasons[2][reason] > 0) {
            std::printf(" (stock: %s %lld)", reason_name(static_cast<Reason>(reason)),
                        static_cast<long long>(stats.reasons[2][reason]));
        }
    }
    if (stats.keys_visible > 0) {
        std::printf(
            " keys attended %.2f %%, bytes read %.1f %%, heads without a scan %.2f %%, in full %.2f %%, delta mean %.4f, most "
            "%.4f; "
            "index %.0f MB, %.1f %% of the cells it covers",
            100.0 * static_cast<double>(stats.keys_attended) / static_cast<double>(stats.keys_visible),
            100.0 * static_cast<double>(stats.bytes_read) / static_cast<double>(stats.bytes_dense),
            100.0 * static_cast<double>(stats.heads_uniform) / queries,
            100.0 * static_cast<double>(stats.heads_in_full) / queries, stats.delta_sum / queries, stats.delta_max,
            static_cast<double>(stats.index_bytes) * 1e-6,
            100.0 * static_cast<double>(stats.index_bytes) / std::max<double>(1, static_cast<double>(stats.cache_bytes)));
    }
    std::printf("\n");
    if (options.check) {
        std::printf(
            "check: %lld (key, query head) pairs, %lld missed, %lld above their bound, %lld heads dropped more than they say\n",
            static_cast<long long>(stats.checked.pairs), static_cast<long long>(stats.checked.misses),
            static_cast<long long>(stats.checked.bound_violations), static_cast<long long>(stats.checked.mass_violations));
    }
    std::fflush(stdout);
}

void measure_phases(const std::vector<CapturedOp> & ops, const Options & options, double copy) {
    for (int64_t n_kv = 4096; n_kv <= options.depth; n_kv *= 2) {
        DecodeSettings settings;
        settings.epsilon = options.epsilon;
        if (2 * n_kv > options.depth) {  // what `ncu --profile-from-start off` sees
            cudaProfilerStart();
        }
        print_phases(phases_of(ops, n_kv, settings), n_kv, copy);
    }
    cudaProfilerStop();
}

void run(const Options & options) {
    if (options.n_random > 0) {
        return measure_phases(random_ops(options.n_random, options.depth), options, copy_bandwidth());
    }
    attach();
    ModelRun model(options);
    std::printf("filled %d tokens as %d texts: a text takes %s s with louver, %s s without\n", options.depth, model.n_texts(),
                spread(model.fill_with(), 1).c_str(),
                model.fill_without().empty() ? "-" : spread(model.fill_without(), 1).c_str());
    model.step(0);  // makes what is not indexed yet
    model.rewind();
    measure_quality(model, options);
    if (options.check) {
        return;
    }
    measure_model(model, options);
    if (options.layers) {
        model.enable(false);
        const std::vector<CapturedOp> ops = capture([&] { model.step(0); });
        attach();  // the capture took its place
        model.rewind();
        const double copy = copy_bandwidth();
        for (int64_t n_kv = 4096; n_kv <= options.depth; n_kv *= 2) {
            measure_layers(model, ops, n_kv, options);
        }
        measure_phases(ops, options, copy);
    }
}

}  // namespace
}  // namespace louver::bench

int main(int argc, char ** argv) {
    try {
        louver::bench::run(louver::bench::parse(argc, argv));
    } catch (const std::exception & error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
