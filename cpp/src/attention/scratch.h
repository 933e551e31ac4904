// Where a decode step keeps what lies between its phases.
#pragma once

#include <cstddef>
#include <cstdint>

#include "louver/decode.h"
#include "louver/mass_oracle.h"

namespace louver {

// A thread takes chunks of this many blocks in turn: big enough to stream, small enough to spread the survivors evenly.
inline constexpr int kChunkBlocks = 8;
inline constexpr int kChunkCells = kChunkBlocks * kBlockCells;

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
};

struct Scratch {
    // Shared by the team.
    int32_t * not_finite;  // [team] raised by the thread of that rank
    float * query;         // [n_head][key_padded]
    float * query_norm;    // [n_head]
    float * reference;     // [n_head] log2 units
    float * weight;        // [n_head][weight_stride]
    float * slack;         // [n_head][n_blocks]
    double * lower;        // [team][n_head]
    Sums * coarse;         // [team][n_head]
    Sums * fine;           // [team][n_head]
    Partial * partial;     // [team][n_head]
    float * output;        // [team][n_head][value_padded]
    // Of this thread alone.
    MassOracle::Bracket * bracket;  // [n_head]
    double * total;                 // [n_head]
    float * threshold;              // [n_head]
    float * keys;                   // [64][key_padded]
    float * values;                 // [64][value_padded]
    float * scores;                 // [n_gqa][64]
    float * rescale;                // [n_gqa]
    float * block_sums;             // [n_gqa][kChunkBlocks] of the dropped cells' weights
    uint64_t * kept;                // [n_head_kv][kChunkBlocks] survivors of the chunk at hand, as the next two
    int32_t * n_cells;              // [n_head_kv]
    int32_t * cells;                // [n_head_kv][kChunkCells]

    int n_blocks;
    int64_t weight_stride;  // n_kv in whole blocks, and a line more: heads must not share cache sets
    size_t bytes;           // of all of it

    // Lays the arrays out from base on; base may be null to learn the size.
    Scratch(std::byte * base, int n_head, int n_head_kv, int64_t n_kv, int key_dim, int value_dim, int rank, int team_size);
};

}  // namespace louver
