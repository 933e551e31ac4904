#include "ggml/attention_op.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "attention/scratch.h"
#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "ggml/attention_view.h"
#include "ggml/registry.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

constexpr size_t kLine = 64;

std::byte * align_up(void * p) {
    return reinterpret_cast<std::byte *>((reinterpret_cast<uintptr_t>(p) + kLine - 1) / kLine * kLine);
}

size_t in_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// What thread 0 decided for the team, at the very end of the work buffer: stock, should it run, does not reach that far.
struct Verdict {
    HostCache * cache;  // null: stock runs, nothing is to be done
    bool repair_only;   // prefill: bring the index up to date, then stock
    RuntimeConfig config;
};

// More query tokens than kMaxTokens is prefill: nothing is computed here, and no scratch is needed.
int n_served(const AttentionView & a) { return a.n_token <= kMaxTokens ? a.n_token : 0; }

// The parts of ggml's work buffer. Before decode()'s scratch lie the visible cells of every token.
struct Work {
    Verdict * verdict;
    uint64_t * visible;    // [n_stream][n_token][n_blocks]
    uint8_t * plain_mask;  // [threads] what mask_to_bits said
    std::byte * scratch;

    static size_t bytes(const AttentionView & a, int n_threads) {
        return kLine + in_lines(words(a) * sizeof(uint64_t)) + in_lines(static_cast<size_t>(n_threads)) +
               decode_scratch_bytes(n_served(a), a.n_head, a.n_head_kv, a.n_kv, a.key_dim, a.value_dim, n_threads) +
               in_lines(sizeof(Verdict)) + kLine;
    }

    Work(const AttentionView & a, const ggml_compute_params & params) {
        std::byte * base = align_up(params.wdata);
        visible = reinterpret_cast<uint64_t *>(base);
        plain_mask = reinterpret_cast<uint8_t *>(base + in_lines(words(a) * sizeof(uint64_t)));
        scratch = reinterpret_cast<std::byte *>(plain_mask) + in_lines(static_cast<size_t>(params.nth));
        std::byte * end = static_cast<std::byte *>(params.wdata) + params.wsize;
        verdict = reinterpret_cast<Verdict *>(align_up(end - in_lines(sizeof(Verdict)) - kLine));
    }

  private:
    static size_t words(const AttentionView & a) {
        return static_cast<size_t>(a.n_stream) * static_cast<size_t>(n_served(a)) * static_cast<size_t>(n_blocks_for(a.n_kv));
    }
};

// The cache this op reads, registered with its owner if it is new or has become another.
HostCache * find_or_add(const AttentionView & a, Runtime * owner) {
    Registry & registry = Registry::instance();
    Cache * cache = registry.find(a.k_cache->data);
    if (cache == nullptr || !a.reads(*cache)) {
        cache = registry.add(std::make_unique<HostCache>(owner, a.layer(), a.k_plane(), a.v_plane(), a.kv_size, a.n_head_kv),
                             a.k_cache->buffer, a.v_cache->buffer);
    }
    return static_cast<HostCache *>(cache);  // ggml-cpu reads nothing else
}

// Thread 0 alone: for tools that look at attention outside of the model.
void capture(const AttentionView & a, Reason reason) {
    Runtime * owner = a.owner();
    if (owner != nullptr && owner->capture().is_on()) {
        const int layer = a.k_cache != nullptr ? a.layer() : -1;
        const bool sliding = reason == Reason::none && owner->config().n_ctx > a.kv_size;
        owner->capture().see(a, layer, reason_name(sliding ? Reason::sliding_window : reason));
    }
}

// Thread 0 alone: what the team will do, and the counts of what it will not.
Verdict decide(const AttentionView & a, int n_threads) {
    Verdict verdict{};
    Runtime * owner = a.owner();
    if (owner == nullptr) {
        return verdict;
    }
    verdict.config = owner->config();
    Reason reason = Reason::none;
    if (!verdict.config.enabled) {
        reason = Reason::disabled;
    } else if (verdict.config.n_ctx > a.kv_size) {
        reason = Reason::sliding_window;
    } else if (a.n_token > kMaxTokens) {
        reason = Reason::prefill;
    }
    if (reason != Reason::none) {
        owner->count(Path::stock, reason, a.n_query());
    }
    if (reason != Reason::none && reason != Reason::prefill) {
        return verdict;
    }
    verdict.cache = find_or_add(a, owner);
    verdict.repair_only = reason == Reason::prefill;
    verdict.cache->collect();
    verdict.cache->expect(verdict.config.decode);
    const size_t threads = static_cast<size_t>(n_threads);
    HostCache::Step & step = verdict.cache->step;
    step.pending = true;
    step.queries.clear();
    step.checked.assign(threads, {});
    step.blocks_built.assign(threads, 0);
    step.cells_encoded.assign(threads, 0);
    step.n_head = a.n_head;
    if (!verdict.repair_only) {
        step.certificates.resize(static_cast<size_t>(a.n_query()) * static_cast<size_t>(a.n_head));
    }
    return verdict;
}

// This thread's chunks of blocks: which cells each query sees, and the index of the blocks that are complete.
void see_and_repair(const AttentionView & a, const Work & work, HostCache & cache, bool only_last_token, int rank,
                    int team_size) {
    const int n_blocks = n_blocks_for(a.n_kv);
    // A prefill fills a few blocks in a row, which every thread should have its share of.
    const int chunk = only_last_token ? 1 : kChunkBlocks;
    int64_t blocks_built = 0;
    int64_t cells_encoded = 0;
    bool plain = true;
    const int first_token = only_last_token ? a.n_token - 1 : 0;
    for (int stream = 0; stream < a.n_stream; ++stream) {
        for (int first = rank * chunk; first < n_blocks; first += team_size * chunk) {
            const int count = std::min(chunk, n_blocks - first);
            // One block more than the chunk: a block is complete as soon as its successor is in use.
            uint64_t any[kChunkBlocks + 1] = {};
            for (int token = first_token; token < a.n_token; ++token) {
                uint64_t seen[kChunkBlocks + 1] = {};
                const int64_t start = static_cast<int64_t>(first) * kBlockCells;
                const int64_t cells = std::min<int64_t>((count + 1) * kBlockCells, a.n_kv - start);
                if (a.mask != nullptr) {
                    const std::byte * row = static_cast<const std::byte *>(a.mask->data) +
                                            static_cast<size_t>(token) * a.mask->nb[1] +
                                            static_cast<size_t>(stream % a.mask->ne[3]) * a.mask->nb[3];
                    plain = kernels().mask_to_bits(reinterpret_cast<const uint16_t *>(row) + start, cells, seen) && plain;
                } else {
                    for (int64_t i = 0; i < cells; ++i) {
                        seen[i / kBlockCells] |= uint64_t{1} << (i % kBlockCells);
                    }
                }
                for (int b = 0; b <= count; ++b) {
                    any[b] |= seen[b];
                }
                if (!only_last_token) {
                    std::copy(seen, seen + count,
                              work.visible + static_cast<int64_t>(stream * a.n_token + token) * n_blocks + first);
                }
            }
            for (int b = 0; b < count; ++b) {
                if (any[b] == ~uint64_t{0} || (any[b] != 0 && any[b + 1] != 0)) {
                    cache.repair(a.first_stream + stream, first + b, any[b], blocks_built, cells_encoded);
                }
            }
        }
    }
    work.plain_mask[rank] = plain;
    cache.step.blocks_built[static_cast<size_t>(rank)] = blocks_built;
    cache.step.cells_encoded[static_cast<size_t>(rank)] = cells_encoded;
}

int64_t count(const uint64_t * words, int n_blocks) {
    int64_t n = 0;
    for (int b = 0; b < n_blocks; ++b) {
        n += std::popcount(words[b]);
    }
    return n;
}

// Whether two tokens see so much in common that one scan and one gather serve both.
bool see_alike(const uint64_t * one, const uint64_t * other, int n_blocks) {
    int64_t common = 0;
    int64_t all = 0;
    for (int b = 0; b < n_blocks; ++b) {
        common += std::popcount(one[b] & other[b]);
        all += std::popcount(one[b] | other[b]);
    }
    return 2 * common >= all;
}

// Every token of the op, tokens that see alike together, the whole team at each. False: stock has to run.
bool decode_all(const AttentionView & a, const Work & work, const Verdict & verdict, const Team & team, Reason & reason) {
    HostCache & cache = *verdict.cache;
    const int n_blocks = n_blocks_for(a.n_kv);
    if (std::any_of(work.plain_mask, work.plain_mask + team.size, [](uint8_t plain) { return plain == 0; })) {
        reason = Reason::mask_values;
        return false;
    }
    const auto visible = [&](int q) { return work.visible + static_cast<int64_t>(q) * n_blocks; };
    const auto is_short = [&](int q) { return count(visible(q), n_blocks) < verdict.config.min_context; };
    for (int q = 0; q < a.n_query();) {
        const int stream = q / a.n_token;
        const int token = q % a.n_token;
        HostCache::Step::Query query{a.first_stream + stream, token, Path::louver, Reason::none};
        const bool short_context = is_short(q);
        if (verdict.config.decode.epsilon <= 0 || short_context) {
            query.path = Path::dense;
            query.reason = short_context ? Reason::below_min_context : Reason::epsilon_zero;
        }
        int n_token = 1;
        while (token + n_token < a.n_token && is_short(q + n_token) == short_context &&
               see_alike(visible(q), visible(q + n_token), n_blocks)) {
            ++n_token;
        }
        DecodeTask task;
        task.n_token = n_token;
        task.n_head = a.n_head;
        task.n_head_kv = a.n_head_kv;
        task.n_kv = a.n_kv;
        task.scale = a.scale;
        task.query = static_cast<const std::byte *>(a.query->data) + static_cast<size_t>(token) * a.query->nb[1] +
                     static_cast<size_t>(stream) * a.query->nb[3];
        task.query_token_stride = static_cast<int64_t>(a.query->nb[1]);
        task.query_stride = static_cast<int64_t>(a.query->nb[2]);
        task.keys = cache.keys(a.first_stream + stream);
        task.values = cache.values(a.first_stream + stream);
        task.index = cache.index(a.first_stream + stream);
        task.attend_all = cache.uniform(a.first_stream + stream);
        task.visible = visible(q);
        task.output = static_cast<std::byte *>(a.op->data) + static_cast<size_t>(token) * a.op->nb[2] +
                      static_cast<size_t>(stream) * a.op->nb[3];
        task.output_token_stride = static_cast<int64_t>(a.op->nb[2]);
        task.output_stride = static_cast<int64_t>(a.op->nb[1]);
        task.certificates = cache.step.certificates.data() + static_cast<size_t>(q) * static_cast<size_t>(a.n_head);
        task.checked = cache.step.checked.data();
        task.settings = verdict.config.decode;
        if (query.path == Path::dense) {
            task.settings.epsilon = 0;
        }
        if (decode(task, team, work.scratch) != Outcome::done) {
            reason = Reason::not_finite;
            return false;
        }
        for (int end = q + n_token; q < end; ++q, ++query.token) {
            if (team.rank == 0) {
                cache.step.queries.push_back(query);
            }
        }
        if (q < a.n_query()) {
            team.barrier();
        }
    }
    return true;
}

}  // namespace

size_t attention_work_size(int n_threads, const ggml_tensor * op) {
    AttentionView view{};
    return view.read(op) == Reason::none ? Work::bytes(view, n_threads) : 0;
}

bool attention_forward(ggml_compute_params * params, ggml_tensor * op) {
    AttentionView view{};
    Reason reason = view.read(op);
    if (reason == Reason::none && Work::bytes(view, params->nth) > params->wsize) {
        reason = Reason::work_buffer;
    }
    if (params->ith == 0) {
        capture(view, reason);
    }
    if (reason != Reason::none) {
        // Every thread has read the same tensors and come to the same end.
        Runtime * owner = params->ith == 0 ? view.owner() : nullptr;
        if (owner != nullptr) {
            owner->count(Path::stock, reason, view.n_query());
        }
        return false;
    }

    const Work work(view, *params);
    const Team team{params->ith, params->nth, [](void * pool) { ggml_barrier(static_cast<ggml_threadpool *>(pool)); },
                    params->threadpool};
    if (team.rank == 0) {
        *work.verdict = decide(view, team.size);
    }
    team.barrier();
    const Verdict verdict = *work.verdict;
    if (verdict.cache == nullptr) {
        return false;
    }
    see_and_repair(view, work, *verdict.cache, verdict.repair_only, team.rank, team.size);
    team.barrier();
    if (verdict.repair_only) {
        return false;
    }
    if (decode_all(view, work, verdict, team, reason)) {
        return true;
    }
    if (team.rank == 0) {
        verdict.cache->step.queries.clear();
        verdict.cache->owner->count(Path::stock, reason, view.n_query());
    }
    team.barrier();  // stock writes where this thread may still be read
    return false;
}

}  // namespace louver
