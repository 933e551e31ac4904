// Where a decode step keeps what lies between its phases.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/visible.h"
#include "louver/decode.h"
#include "louver/mass_oracle.h"

namespace louver {

// A thread takes chunks of at most this many blocks in turn: big enough to stream, small enough to spread the survivors evenly.
inline constexpr int kChunkBlocks = 8;
inline constexpr int kChunkCells = kChunkBlocks * kBlockCells;

struct Shape {
    int n_token;
    int n_head;
    int n_head_kv;
    int64_t n_kv;
    int key_dim;
    int value_dim;
};

// What one thread found for one query head. Weights are in units of 2^reference.
struct Partial {
    float peak;           // log2, of the largest exact weight so far; the sums below are in units of 2^peak
    double kept;          // exact weights of the attended cells
    double dropped;       // upper bound on the weights of the dropped cells; in units of 2^reference, as the next
    double compensation;  // approximate weights that compensation added
    float value_norm;     // largest |value| where something was dropped
    float key_norm;       // largest |key| attended
    int32_t attended;
    int32_t scanned;
    double checked_kept;  // brute force: exact weights of the attended and of the dropped cells
    double checked_dropped;

    // Takes in a thread's part; factor: its unit of kept, in units of this one's.
    void add(const Partial & part, double factor);
};

// What the scan says of one query.
struct Guess {
    double total;  // lower bound on the weights' sum
    float threshold;
};

// What one token sees.
struct Sight {
    int64_t n_visible;
    Always always;
};

// A query is one query head of one token. The n_group queries of a KV head lie together: [n_head_kv][n_token][n_gqa].
struct Scratch {
    // Shared by the team.
    int32_t * not_finite;  // [team] raised by the thread of that rank
    float * query;         // [n_query][key_padded]
    float * query_norm;    // [n_query]
    float * reference;     // [n_query] log2 units
    float * weight;        // [n_query][weight_stride]
    double * lower;        // [team][n_query]
    double * upper;        // [team][n_query] of the weights dropped
    Sums * below;          // [team][n_query]
    Guess * shared_guess;  // [n_query]
    Partial * partial;     // [team][n_query]
    float * output;        // [team][n_query][value_padded]
    // Of this thread alone: threads that wrote side by side would wait for each other's cache lines.
    float * slack;        // [n_query][n_own]
    float * dropped;      // [n_query][n_own] sum of the upper weights that were not kept
    uint64_t * kept;      // [n_head_kv][n_own] survivors
    Sight * sight;        // [n_token]
    Guess * guess;        // [n_query]
    float * threshold;    // [n_query]
    uint8_t * refines;    // [n_query] the guess of the threshold was not good enough
    float * keys;         // [64][key_padded]
    float * scores;       // [n_group][64]
    float * rescale;      // [n_group]
    float * block_sums;   // [n_group][kChunkBlocks] of the dropped cells' weights
    uint64_t * scanning;  // [n_group][kChunkBlocks] what each query of a group scans
    int32_t * n_cells;    // [2][n_head_kv] survivors of a chunk and of the next
    int32_t * cells;      // [2][n_head_kv][kChunkCells]

    int n_blocks;
    int chunk_blocks;       // of a chunk, dealt to the threads in turn
    int n_own;              // blocks of one thread, in whole chunks
    int64_t weight_stride;  // n_kv in whole blocks, and a line more: heads must not share cache sets
    size_t bytes;           // of all of it

    // Where a block of this thread's lies in row `row` of an array [..][n_own].
    size_t own(int row, int block, int team_size) const {
        const int chunk = block / chunk_blocks;
        return static_cast<size_t>(row) * static_cast<size_t>(n_own) +
               static_cast<size_t>(chunk / team_size * chunk_blocks + block % chunk_blocks);
    }

    // Lays the arrays out from base on; base may be null to learn the size.
    Scratch(std::byte * base, const Shape & shape, int rank, int team_size);
};

}  // namespace louver
