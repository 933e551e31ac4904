// One attention op as the kernels see it. Passed by value: what changes from step to step is behind the pointers, at fixed
// addresses, so that a captured CUDA graph stays valid.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/planes.h"
#include "louver/decode.h"

namespace louver::cuda {

// The most query heads that share a scan; larger groups are cut into parts of equal size.
inline constexpr int kMaxShared = 8;

// The scan sorts every upper bound into bins of an eighth of a log2 unit. Bin b of a query holds the cells whose weight
// 2^(score - reference) is below 2^((b + 1 - kReferenceBin) / 8); the last one has no upper edge and is never dropped.
inline constexpr int kBins = 256;
inline constexpr int kBinsPerOctave = 8;
inline constexpr int kReferenceBin = 208;

// A lower bound on the mass, added up in whole units so that the sum does not depend on the order: of what a lane finds in a
// block what is below kSmallMass, and the rest, of which no more than kLargeMass counts. 2^kMostBlockBits blocks fit into 64
// bits.
inline constexpr float kSmallUnit = 0x1p-28f;
inline constexpr float kSmallMass = 0x1p11f;
inline constexpr float kLargeUnit = 0x1p-4f;
inline constexpr float kLargeMass = 0x1p35f;
inline constexpr int kMostBlockBits = 20;

// Blocks of a share at most: its sums of float32 have no more additions one after another than their margins cover, and an
// eighth of its cells, a warp's part, has numbers of 16 bits.
inline constexpr int kMostOwnBlocks = 1 << 13;

// Bytes to a block of what a share keeps between scan and attention (ShareCells).
constexpr size_t bytes_of_share_block(int n_most) {
    const auto n = static_cast<size_t>(n_most);
    return (n * (kBlockCells + 4) + kBlockCells * 2 + 24 + 4 + 15) / 16 * 16;
}

// Floats of a share's output, all of them a constant apart, whatever the shape: an address is a fixed distance from another.
inline constexpr int kPartStride = kMaxShared * kMaxKernelDim;

inline constexpr int kAttendAll = -1;

// Shares of a group, where there are more groups than processors.
inline constexpr int kMostRounds = 4;

inline constexpr int kProbesFirst = 4;
inline constexpr int kProbesLast = 28;
inline constexpr int kProbes = kProbesFirst + kProbesLast;

// Caches whose rows are attended to on the tensor cores.
constexpr bool on_tensor_cores(DType type) { return type == DType::f16 || type == DType::bf16; }

// What a query token sees, worked out once for all layers that share the mask.
struct Sight {
    int32_t n_visible = 0;
    int32_t sinks_end = 0;     // visible cells before this one are sinks,
    int32_t recent_begin = 0;  // and from this one on recent: both are always attended
    int32_t plain = 1;         // 0: the mask holds something other than 0 and -infinity, which is added to the scores
    // Cells whose exact scores every thread block works out: the visible ones before probes_end and from probes_begin on.
    int32_t n_probes = 0;
    int32_t probes_end = 0;
    int32_t probes_begin = 0;
    int32_t probes[kProbes] = {};
};

// A mask of float16 [n_stream][n_token][n_kv], strides in bytes; null: everything is visible.
struct Mask {
    const std::byte * data = nullptr;
    int64_t token_stride = 0;
    int64_t stream_stride = 0;
};

// Counts over all steps since they were reset, of one cache.
struct Totals {
    unsigned long long queries;    // (token, query head)
    unsigned long long tokens[2];  // with epsilon 0, and above
    unsigned long long uniform;
    unsigned long long visible;
    unsigned long long scanned;
    unsigned long long attended;
    unsigned long long group_scanned;   // counted once for the heads that share a scan,
    unsigned long long group_attended;  // a gather
    unsigned long long group_visible;
    unsigned long long not_finite;  // queries that were attended in full because of a number that is not finite or too large
    unsigned long long not_plain;   // or because of the mask
    double delta_sum;
    double delta_max;
    double error_bound_max;
    unsigned long long blocks_built;
    unsigned long long cells_encoded;
    unsigned long long pairs;  // the next four as in CheckCounts
    unsigned long long misses;
    unsigned long long bound_violations;
    unsigned long long mass_violations;
};

// What a warp found of a group's query: unnormalised output and mass relative to 2^peak.
struct PartialHead {
    float peak;
    float kept;
};

// What a thread block found of a query, in log2 units relative to the query's reference.
struct alignas(16) ShareHead {
    float peak;
    float kept;          // mass, in the unit 2^peak; the rest relative to the reference
    float dropped;       // upper bound on what was dropped,
    float compensation;  // weight added back for it,
    float least;         // a lower bound on the mass of the share
    int32_t threshold;   // the first bin that is kept; kAttendAll where nothing was scanned
    int32_t unused[2];
};

struct alignas(16) ShareCounts {
    int32_t scanned;
    int32_t attended;
    float value_norm;  // of any dropped value
    int32_t unused;
};

// What kernels divide group numbers by: a division in full is a third of what a short kernel has to fetch of code. Exact for
// dividends from 0 to 2^21: half is far enough from the next whole multiple for float32.
struct Divisor {
    int value = 1;
    float inverse = 1;

    Divisor() = default;
    LOUVER_BOTH Divisor(int divisor) : value(divisor), inverse(1.0f / static_cast<float>(divisor)) {}
    LOUVER_BOTH operator int() const { return value; }
    friend LOUVER_BOTH int operator/(int a, const Divisor & by) {
        return static_cast<int>((static_cast<float>(a) + 0.5f) * by.inverse);
    }
    friend LOUVER_BOTH int operator%(int a, const Divisor & by) { return a - a / by * by.value; }
};

// How a group's blocks are dealt to its shares: the first `longer` have one more than `each`.
struct Deal {
    int each = 0;
    int longer = 0;

    Deal() = default;
    Deal(int n_blocks, int n_share) : each(n_blocks / n_share), longer(n_blocks % n_share) {}
    LOUVER_BOTH int n_of(int share) const { return each + (share < longer ? 1 : 0); }
    // Blocks that lie before those of a share, if they are put share by share.
    LOUVER_BOTH int begin_of(int share) const { return share * each + (share < longer ? share : longer); }
};

// A group and its shares.
struct GroupShares {
    int group;
    int first;
    int n;
};

struct Problem {
    // Shape. A group is the query heads of one token that share a KV head, kMaxShared at most; its queries are numbered
    // group * n_shared + i, some of which may not exist in the last part of a KV head.
    Divisor n_token;
    int n_stream;
    int first_stream;
    int n_head;
    Divisor n_head_kv;
    int n_gqa;
    Divisor n_part;          // groups to a token's KV head,
    Divisor n_group_of_row;  // to a token
    int n_shared;            // queries to a group
    int n_group;
    int n_kv;
    int n_blocks;  // in use
    int64_t kv_size;
    float to_log2;

    const std::byte * query;  // float32, strides in bytes
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t query_stream_stride;
    std::byte * output;
    int64_t output_token_stride;
    int64_t output_head_stride;
    int64_t output_stream_stride;
    Mask mask;
    Plane keys;
    Plane values;
    Planes planes;

    float epsilon;  // 0: everything is attended
    bool certified;
    bool compensate;
    bool check;
    size_t most_shared;   // bytes of shared memory that a thread block may have
    bool spares_uniform;  // heads that attended to nearly all keys lately are not scanned

    // [n_group][n_shared] references in log2 units that the caller of a scan alone sets: every key whose score lies above its
    // reference is in bin kReferenceBin or above. One exactly at it may not be. Null: probes are the reference, for the mass
    // oracle.
    const float * given;

    // [n_stream * n_token], and [n_stream * n_token][visible_stride] words.
    const Sight * sight;
    const uint64_t * visible;
    int64_t visible_stride;

    // Scratch. A share is what a thread block has of a group: every n-th of its blocks of cells, of which it has one at least.
    Divisor n_even;  // shares of a group,
    Divisor n_more;  // and one more,
    Deal even;       // and their blocks
    Deal more;
    int n_share;            // of all groups together; the first groups have one more if it takes that
    float * reference;      // [n_group][n_shared] log2 units
    uint8_t * bins;         // [n_group][n_shared][n_blocks][64], of a scan alone and with `check`
    std::byte * far_cells;  // [n_group][n_blocks][bytes_of_share_block(kMaxShared)] of shares that shared memory is too small for
    int32_t * attend_all;   // [n_group] not 0: the caller wants all of it attended; of a scan alone: it met what is not finite
    uint64_t * kept;        // [n_group][n_blocks]
    int32_t * gave_up;      // [n_group] not 0: all was attended, as the caller wanted or for what is not finite. Or null
    int32_t * arrived;      // [n_group] shares that are done. Zero before and after a step
    int32_t * combined;     // [n_stream * n_head_kv] groups that are done. Zero before and after a step
    ShareCounts * counts;   // [share]
    ShareHead * of_share;   // [share][kMaxShared]
    float * part;           // [share][kMaxShared][kMaxKernelDim] unnormalised output relative to 2^peak
    uint64_t * bounded;     // [n_group][n_blocks] cells that were bounded through the index; with `check` only
    double * check_sums;    // [n_group][n_shared][2] true mass kept and dropped; zero before and after a step

    // Blocks to encode: complete, with visible cells that are not indexed. Found by the scan, built at the end of the step.
    int32_t * n_pending;  // [n_stream * n_head_kv]; zero before and after a step
    int32_t * pending;    // [slots of the planes] those of a stream's head where its slots begin
    int32_t * queued;     // per cache, [slots of the planes] not 0: it is in the list. Null: the index does not change

    // Per cache.
    uint8_t * without_scan;          // [n_stream][n_head_kv][n_part] steps without a scan that are left to a uniform head
    HeadCertificate * certificates;  // [n_stream * n_token][n_head]
    Totals * totals;

    LOUVER_BOTH int row_of_group(int group) const { return group / n_group_of_row; }
    LOUVER_BOTH int kv_head_of(int group) const { return group / n_part % n_head_kv; }
    LOUVER_BOTH int part_of(int group) const { return group % n_part; }
    LOUVER_BOTH int stream_of(int group) const { return first_stream + row_of_group(group) / n_token; }
    LOUVER_BOTH int head_of(int group, int i) const { return kv_head_of(group) * n_gqa + part_of(group) * n_shared + i; }
    LOUVER_BOTH int n_query_of(int group) const {
        const int left = n_gqa - part_of(group) * n_shared;
        return left < n_shared ? left : n_shared;
    }
    LOUVER_BOTH int64_t first_row(int group) const { return static_cast<int64_t>(stream_of(group)) * kv_size; }
    LOUVER_BOTH int64_t slot_of(int group, int block) const { return planes.slot(stream_of(group), kv_head_of(group), block); }
    LOUVER_BOTH const float * query_of(int group, int i) const {
        const int row = row_of_group(group);
        return reinterpret_cast<const float *>(query + row % n_token * query_token_stride + row / n_token * query_stream_stride +
                                               head_of(group, i) * query_head_stride);
    }
    LOUVER_BOTH float * output_of(int group, int i) const {
        const int row = row_of_group(group);
        return reinterpret_cast<float *>(output + row % n_token * output_token_stride + row / n_token * output_stream_stride +
                                         head_of(group, i) * output_head_stride);
    }
    LOUVER_BOTH const uint64_t * visible_of(int group) const { return visible + row_of_group(group) * visible_stride; }
    // Whether the group runs without a scan, all of it attended.
    LOUVER_BOTH uint8_t * uniform_of(int group) const {
        return without_scan + (static_cast<int64_t>(stream_of(group)) * n_head_kv + kv_head_of(group)) * n_part + part_of(group);
    }
    LOUVER_BOTH GroupShares shares_of_group(int group) const {
        const int n_longer = n_share - n_even.value * n_group;  // groups
        return {group, group * n_even.value + (group < n_longer ? group : n_longer), n_even.value + (group < n_longer ? 1 : 0)};
    }
    // Of the group that has a share.
    LOUVER_BOTH GroupShares shares_of(int share) const {
        const int n_longer = n_share - n_even.value * n_group;
        const int behind = share - n_longer * n_more.value;
        return shares_of_group(behind < 0 ? share / n_more : n_longer + behind / n_even);
    }
    LOUVER_BOTH int most_shares() const { return n_more.value; }
    LOUVER_BOTH const Deal & deal_of(const GroupShares & shares) const { return shares.n == n_even.value ? even : more; }
    // Of a KV head of a stream, among those of the op.
    LOUVER_BOTH int pair_of(int group) const { return row_of_group(group) / n_token * n_head_kv.value + kv_head_of(group); }
    LOUVER_BOTH int groups_of_pair() const { return n_token.value * n_part.value; }

    // As many shares as a device has processors, if there is as much to do; of more groups than those, the number that takes
    // the fewest rounds for the work of one.
    void share_out(int n_processors) {
        const int most = std::max((n_blocks + 7) / 8, 1);  // of a group
        if (n_group <= n_processors) {
            n_share = std::max(std::min(n_processors, most * n_group), n_group);
        } else {
            double least = 0;
            for (int n = 1; n <= std::min(most, kMostRounds); ++n) {
                const int rounds = (n_group * n + n_processors - 1) / n_processors;
                const double cost = rounds * (1.0 / n + 0.02);  // every round begins and ends
                if (n == 1 || cost < least) {
                    least = cost;
                    n_share = n_group * n;
                }
            }
        }
        n_even = n_share / n_group;
        n_more = n_share / n_group + 1;
        even = Deal(n_blocks, n_even.value);
        more = Deal(n_blocks, n_more.value);
    }
};

}  // namespace louver::cuda
