// Attention of a few query tokens over one layer's cache: select by the mass oracle, attend exactly to the survivors,
// compensate for the rest, certify. Run by a team of threads; knows no engine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "louver/grid_index.h"
#include "louver/types.h"

namespace louver {

struct DecodeSettings {
    double epsilon = 0.05;   // largest share of the softmax mass that may be dropped, in [0, 1); 0: nothing, which is dense
    bool certified = true;   // false: trust the index's scores without slack; delta is then an estimate
    bool compensate = true;  // add dropped cells back as approximate weight times their block's mean value
    int sinks = 4;           // the first visible cells, always attended
    int recent = 64;         // the last visible cells, always attended
    bool check = false;      // compare everything with brute force, for tests and doubts: slower than dense
};

// What is proven of one query head's output at one step.
struct HeadCertificate {
    float tau = 0;  // every visible key with q.k >= tau was attended
    int32_t n_visible = 0;
    int32_t n_scanned = 0;   // keys bounded through the index
    int32_t n_attended = 0;  // keys scored exactly
    float delta = 0;         // the dropped share of the softmax mass is at most this
    float error_bound = 0;   // |output - dense output| is at most this
};

// Brute force beside the index (DecodeSettings::check).
struct CheckCounts {
    int64_t pairs = 0;             // (visible key, query head) pairs compared
    int64_t misses = 0;            // pairs with q.k >= tau that were not attended
    int64_t bound_violations = 0;  // pairs whose exact weight exceeds the index's upper bound
    int64_t mass_violations = 0;   // heads whose true dropped share exceeds delta

    void operator+=(const CheckCounts & other) {
        pairs += other.pairs;
        misses += other.misses;
        bound_violations += other.bound_violations;
        mass_violations += other.mass_violations;
    }
};

// Nanoseconds of one thread by phase.
struct PhaseTimes {
    int64_t begin = 0;   // queries, references
    int64_t scan = 0;    // upper bounds of all scores, and the sample of the oracle
    int64_t select = 0;  // threshold, survivors, what is dropped
    int64_t attend = 0;  // exact attention and compensation
    int64_t combine = 0;
    int64_t wait = 0;  // for other threads, at any barrier
};

// The tokens share one scan and one gather of the survivors: they should see much the same cells.
struct DecodeTask {
    int n_token = 1;
    int n_head = 0;
    int n_head_kv = 0;
    int64_t n_kv = 0;
    float scale = 1;                    // of q.k, > 0
    const std::byte * query = nullptr;  // float32 [n_token][n_head][key_dim], the strides in bytes
    int64_t query_token_stride = 0;
    int64_t query_stride = 0;
    const Rows * keys = nullptr;                // [n_head_kv]
    const Rows * values = nullptr;              // [n_head_kv]
    const GridIndex * const * index = nullptr;  // [n_head_kv]; not read where epsilon is 0
    const uint8_t * attend_all = nullptr;       // [n_head_kv] not 0: the KV head is not scanned, all of it is attended. Or null
    const uint64_t * visible = nullptr;         // [n_token][n_blocks_for(n_kv)] bit per cell
    std::byte * output = nullptr;               // float32 [n_token][n_head][value_dim], the strides in bytes
    int64_t output_token_stride = 0;
    int64_t output_stride = 0;
    HeadCertificate * certificates = nullptr;  // [n_token][n_head], out
    PhaseTimes * times = nullptr;              // [team size], out: each thread adds its own. Or null
    CheckCounts * checked = nullptr;           // [team size], out: each thread adds its own where settings.check
    DecodeSettings settings;

    int n_gqa() const { return n_head / n_head_kv; }
};

// The threads that run one task together. All call decode() with the same task and scratch.
struct Team {
    int rank = 0;
    int size = 1;
    void (*wait)(void *) = nullptr;  // a barrier of the team
    void * context = nullptr;

    void barrier() const {
        if (size > 1) {
            wait(context);
        }
    }
};

enum class Outcome {
    done,
    not_finite,  // a NaN, an infinity or an overflow was met: the output is not written, dense attention has to run
};

// Bytes of scratch, 64-byte aligned, that decode() needs for such a task and team.
size_t decode_scratch_bytes(int n_token, int n_head, int n_head_kv, int64_t n_kv, int key_dim, int value_dim, int team_size);

// Every thread of the team returns the same outcome. On return the other threads may still be writing the output and the
// certificates, and reading the scratch: a barrier belongs between a call and whatever uses either.
Outcome decode(const DecodeTask & task, const Team & team, void * scratch);

}  // namespace louver
