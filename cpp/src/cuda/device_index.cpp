#include "cuda/device_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "kernels/bounds.h"

namespace louver::cuda {
namespace {

const cudaStream_t kStream = cudaStreamLegacy;

// A search has every score below 2^(kScoreExponent + 1) log2 units, so that no weight overflows, and references a little beyond.
constexpr int kScoreExponent = 4;
constexpr double kMostReference = 33;
// Products of norms from here on are left to the exact scores.
constexpr double kMostScore = 0x1p100;
// Bins tell a reference from what is below it up to this: tau_of() in cuda/certify.cuh.
constexpr double kReferenceError = 8 * kWeightError;
constexpr double kReferenceUnit = 0x1p-19;

// Of one pass over the keys: the bins of its groups, and what their shares keep, have to fit.
constexpr int64_t kMostGroupCells = int64_t{1} << 27;
constexpr int kMostGroups = 512;
// Of the index: cells are counted in int32.
constexpr int64_t kMostCells = int64_t{1} << 30;
constexpr int kMostHeads = 4096;

Plane plane_of(const StridedKeys & keys) { return {keys.base, keys.row_stride, keys.head_stride, keys.dim, keys.type}; }

template <class T> std::vector<T> fetch(const T * from, size_t n) {
    std::vector<T> host(n);
    if (n > 0) {
        check(cudaMemcpy(host.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    }
    return host;
}

template <class T> void send(T * to, const std::vector<T> & from) {
    if (!from.empty()) {
        check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
}

template <class T> void clear(T * at, size_t n) { check(cudaMemsetAsync(at, 0, n * sizeof(T), kStream), "cudaMemset"); }

void require(bool holds, const std::string & message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

// The largest reference that tells no key with q.k >= tau apart.
float reference_of(double tau, double to_log2) {
    const double exact = std::clamp(tau * to_log2, -kMostReference, kMostReference);
    const double low = exact - kReferenceError - std::fabs(exact) * kReferenceUnit;
    return std::nextafter(static_cast<float>(low), -HUGE_VALF);
}

}  // namespace

Memory packed(int device, const StridedKeys & from) {
    const OnDevice on(device);
    Memory memory(static_cast<size_t>(from.n_head_kv * from.n) * row_bytes(from.type, from.dim));
    launch_pack(from, memory.as<std::byte>(), kStream);
    check(cudaStreamSynchronize(kStream), "packed");
    return memory;
}

// One pass of the kernels: some queries of every KV head, as one token.
struct DeviceIndex::Op {
    Problem p{};
    SearchOp search{};
    float * query = nullptr;      // [n_head][dim]
    float * reference = nullptr;  // [n_group][n_shared]
    double * tau = nullptr;       // [n_group][n_shared]
    float * output = nullptr;     // [n_head][value_dim]
    int32_t * dense = nullptr;    // [n_group]
    Sight * sight = nullptr;
    uint64_t * visible = nullptr;
};

DeviceIndex::DeviceIndex(int device, const StridedKeys & keys, std::shared_ptr<const void> owner)
    : device_(device), keys_(keys), owner_(std::move(owner)) {
    const char * obstacle = unsupported(plane_of(keys), plane_of(keys));
    require(obstacle == nullptr, std::string("keys: ") + (obstacle == nullptr ? "" : obstacle));
    require(keys.n_head_kv <= kMostHeads && keys.n <= kMostCells / keys.n_head_kv,
            "keys have " + std::to_string(keys.n_head_kv) + " heads of " + std::to_string(keys.n) +
                " keys, accepted on a device are 4096 heads and 2^30 keys of all heads at most");
    const OnDevice on(device);
    check(cudaDeviceGetAttribute(&n_processors_, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    most_shared_ = most_shared_of(device);
    build(0);
    const Planes & planes = cache_->planes();
    const size_t blocks = static_cast<size_t>(n_blocks());
    const size_t slots = static_cast<size_t>(keys.n_head_kv) * blocks;
    for (const BlockBounds & bounds : fetch(planes.bounds, slots)) {
        key_norm_ = std::max(key_norm_, static_cast<double>(bounds.key_norm));
    }
    const std::vector<uint64_t> indexed = fetch(planes.indexed, slots);
    std::vector<uint64_t> everywhere(blocks, ~uint64_t{0});
    for (size_t slot = 0; slot < slots; ++slot) {
        everywhere[slot % blocks] &= indexed[slot];
    }
    for (const uint64_t word : everywhere) {
        n_everywhere_ += std::popcount(word);
    }
    everywhere_ = Memory(blocks * sizeof(uint64_t));
    send(everywhere_.as<uint64_t>(), everywhere);
}

DeviceIndex::~DeviceIndex() = default;

void DeviceIndex::build(int widest) {
    Plane no_values;
    no_values.type = keys_.type;
    cache_ = std::make_unique<CacheIndex>(device_, plane_of(keys_), no_values, 1, keys_.n_head_kv, keys_.n, 1, widest);
    cache_->build(0, keys_.n, kStream);
}

size_t DeviceIndex::other_bytes() const {
    const std::lock_guard lock(mutex_);
    return everywhere_.bytes() + scratch_.bytes();
}

int64_t DeviceIndex::require_queries(std::span<const float> queries) const {
    const size_t dim = static_cast<size_t>(keys_.dim);
    require(queries.size() % (dim * static_cast<size_t>(keys_.n_head_kv)) == 0,
            "queries have " + std::to_string(queries.size()) + " numbers, accepted is a multiple of n_head_kv * head_dim = " +
                std::to_string(dim * static_cast<size_t>(keys_.n_head_kv)));
    for (size_t i = 0; i < queries.size(); ++i) {
        require(std::isfinite(queries[i]), "queries has " + std::to_string(queries[i]) + " at [" + std::to_string(i / dim) +
                                               ", " + std::to_string(i % dim) + "], accepted are finite numbers");
    }
    return static_cast<int64_t>(queries.size() / dim);
}

int DeviceIndex::most_gqa() const {
    const int64_t cells = static_cast<int64_t>(n_blocks()) * kBlockCells * keys_.n_head_kv;
    const int64_t groups = std::min<int64_t>(kMostGroupCells / cells, kMostGroups / keys_.n_head_kv);
    return static_cast<int>(std::max<int64_t>(groups, 1)) * kMaxShared;
}

std::vector<float> DeviceIndex::batch_of(std::span<const float> queries, int64_t first, int n_gqa) const {
    const size_t dim = static_cast<size_t>(keys_.dim);
    const size_t n_head_kv = static_cast<size_t>(keys_.n_head_kv);
    const size_t per_head = queries.size() / n_head_kv;
    std::vector<float> batch;
    batch.reserve(n_head_kv * static_cast<size_t>(n_gqa) * dim);
    for (size_t head = 0; head < n_head_kv; ++head) {
        const auto from = queries.subspan(head * per_head + static_cast<size_t>(first) * dim, static_cast<size_t>(n_gqa) * dim);
        batch.insert(batch.end(), from.begin(), from.end());
    }
    return batch;
}

// What Workspace::problem lays out for the engine, for one token without a mask; and what a search or attention adds.
DeviceIndex::Op DeviceIndex::lay_out(int n_gqa, const Plane & values) {
    Op op;
    Problem & p = op.p;
    p.n_token = p.n_stream = 1;
    p.n_head_kv = keys_.n_head_kv;
    p.n_gqa = n_gqa;
    p.n_head = p.n_head_kv * n_gqa;
    p.n_part = (n_gqa + kMaxShared - 1) / kMaxShared;
    p.n_shared = (n_gqa + p.n_part - 1) / p.n_part;
    p.n_group_of_row = p.n_head_kv * p.n_part;
    p.n_group = p.n_group_of_row;
    p.n_kv = static_cast<int>(keys_.n);
    p.n_blocks = n_blocks();
    p.kv_size = keys_.n;
    p.keys = cache_->keys();
    p.values = values;
    p.planes = cache_->planes();
    p.planes.value_dim = values.dim;
    p.certified = true;
    p.share_out(n_processors_);
    p.most_shared = most_shared_;
    p.visible_stride = p.n_blocks + 1;

    const size_t g = static_cast<size_t>(p.n_group);
    const size_t q = g * static_cast<size_t>(p.n_shared);
    const size_t n_head = static_cast<size_t>(p.n_head);
    const size_t blocks = static_cast<size_t>(p.n_blocks);
    const size_t slots = static_cast<size_t>(p.n_head_kv) * blocks;
    const size_t shares = static_cast<size_t>(p.n_share);
    const size_t value_dim = static_cast<size_t>(values.dim);
    const bool attends = values.dim > 0;
    size_t zeros = 0;
    const auto lay = [&](std::byte * base) {
        Parts parts(base);
        p.attend_all = parts.take<int32_t>(g);
        p.arrived = parts.take<int32_t>(g);
        p.combined = parts.take<int32_t>(g);
        p.n_pending = parts.take<int32_t>(g);
        zeros = parts.bytes();
        op.sight = parts.take<Sight>(1);
        op.visible = parts.take<uint64_t>(blocks + 1);
        op.query = parts.take<float>(n_head * static_cast<size_t>(keys_.dim));
        p.reference = parts.take<float>(q);
        p.bins = parts.take<uint8_t>(q * blocks * kBlockCells);
        if (!attends) {
            op.reference = parts.take<float>(q);
            op.tau = parts.take<double>(q);
            op.search.hits = parts.take<uint64_t>(n_head * blocks);
            op.search.counts = parts.take<int64_t>(n_head * blocks + 1);
            op.search.places = parts.take<int64_t>(n_head * blocks + 1);
            op.search.n_scored = parts.take<unsigned long long>(2);
            return parts.bytes();
        }
        p.far_cells = parts.take<std::byte>(g * blocks * bytes_of_share_block(kMaxShared));
        p.kept = parts.take<uint64_t>(g * blocks);
        p.counts = parts.take<ShareCounts>(shares);
        p.of_share = parts.take<ShareHead>(shares * kMaxShared);
        p.part = parts.take<float>(shares * kPartStride);
        p.without_scan = parts.take<uint8_t>(g);
        p.certificates = parts.take<HeadCertificate>(n_head);
        p.totals = parts.take<Totals>(1);
        p.planes.means = parts.take<uint16_t>(slots * value_dim);
        p.planes.bounds = parts.take<BlockBounds>(slots);
        op.output = parts.take<float>(n_head * value_dim);
        op.dense = parts.take<int32_t>(g);
        return parts.bytes();
    };
    if (const size_t bytes = lay(nullptr); bytes > scratch_.bytes()) {
        scratch_ = Memory();  // first, so that both need not fit
        scratch_ = Memory(bytes);
    }
    lay(scratch_.as<std::byte>());
    clear(scratch_.as<std::byte>(), zeros);
    p.query = reinterpret_cast<const std::byte *>(op.query);
    p.query_head_stride = keys_.dim * static_cast<int64_t>(sizeof(float));
    p.output = reinterpret_cast<std::byte *>(op.output);
    p.output_head_stride = values.dim * static_cast<int64_t>(sizeof(float));
    p.sight = op.sight;
    p.visible = op.visible;
    op.search.tau = op.tau;
    op.search.n_exact = op.search.n_scored + 1;
    return op;
}

DeviceMatches DeviceIndex::search(std::span<const float> queries, std::span<const double> tau) {
    const int64_t n_query = require_queries(queries);
    require(static_cast<int64_t>(tau.size()) == n_query, "tau has " + std::to_string(tau.size()) +
                                                             " numbers, accepted is one for "
                                                             "each of " +
                                                             std::to_string(n_query) + " queries");
    DeviceMatches found;
    found.offsets.assign(static_cast<size_t>(n_query) + 1, 0);
    if (n_query == 0 || keys_.n == 0) {
        return found;
    }
    const int64_t n_gqa = n_query / keys_.n_head_kv;
    const size_t dim = static_cast<size_t>(keys_.dim);
    double query_norm = 0;
    for (size_t i = 0; i < static_cast<size_t>(n_query); ++i) {
        double squared = 0;
        for (const float x : queries.subspan(i * dim, dim)) {
            squared += static_cast<double>(x) * static_cast<double>(x);
        }
        query_norm = std::max(query_norm, std::sqrt(squared) * (1 + 0x1p-20));
    }
    const double largest = query_norm * key_norm_;
    const int exponent = largest > 0 && largest < kMostScore ? std::ilogb(largest) : 0;
    const double to_log2 = std::ldexp(1.0, std::min(kScoreExponent - exponent, 100));

    const std::lock_guard lock(mutex_);
    const OnDevice on(device_);
    // A pass's matches: those of its queries of a KV head lie together, here and in the result.
    struct Pass {
        int64_t first;
        int n_gqa;
        std::vector<int64_t> offsets;
        Memory ids;
        Memory scores;
    };
    std::vector<Pass> passes;
    Memory for_counting;
    const int most = most_gqa();
    for (int64_t first = 0; first < n_gqa; first += most) {
        const int n = static_cast<int>(std::min<int64_t>(most, n_gqa - first));
        Op op = lay_out(n, Plane{});
        Problem & p = op.p;
        p.to_log2 = static_cast<float>(to_log2);
        p.given = op.reference;
        send(op.query, batch_of(queries, first, n));
        std::vector<float> reference(static_cast<size_t>(p.n_group * p.n_shared), 0.0f);
        std::vector<double> exact(reference.size(), 0.0);
        for (int group = 0; group < p.n_group; ++group) {
            for (int i = 0; i < p.n_query_of(group); ++i) {
                const int64_t head = p.head_of(group, i);
                const double wanted = tau[static_cast<size_t>(head / n * n_gqa + first + head % n)];
                const size_t at = static_cast<size_t>(group * p.n_shared + i);
                exact[at] = wanted;
                // Without a reference the scan gives up, and every key is scored.
                reference[at] = largest < kMostScore ? reference_of(wanted, to_log2) : HUGE_VALF;
            }
        }
        send(op.reference, reference);
        send(op.tau, exact);
        send(op.sight, std::vector<Sight>(1));
        check(cudaMemcpyAsync(op.visible, everywhere_.as<uint64_t>(), everywhere_.bytes(), cudaMemcpyDeviceToDevice, kStream),
              "cudaMemcpy");
        clear(op.search.n_scored, 2);
        const int64_t n_counts = static_cast<int64_t>(p.n_head) * p.n_blocks + 1;
        clear(op.search.counts + n_counts - 1, 1);
        launch_scan(p, kStream);
        launch_decide(p, op.search, kStream);
        launch_count(op.search, n_counts, for_counting, kStream);
        Pass pass{first, n, std::vector<int64_t>(static_cast<size_t>(p.n_head) + 1), {}, {}};
        check(cudaMemcpy2D(pass.offsets.data(), sizeof(int64_t), op.search.places,
                           static_cast<size_t>(p.n_blocks) * sizeof(int64_t), sizeof(int64_t), pass.offsets.size(),
                           cudaMemcpyDeviceToHost),
              "cudaMemcpy2D");
        const size_t n_hits = static_cast<size_t>(pass.offsets.back());
        pass.ids = Memory(n_hits * sizeof(int64_t));
        pass.scores = Memory(n_hits * sizeof(double));
        if (n_hits > 0) {
            launch_write(p, op.search, pass.ids.as<int64_t>(), pass.scores.as<double>(), kStream);
        }
        const std::vector<unsigned long long> counts = fetch(op.search.n_scored, 2);
        found.stats.n_scored += static_cast<int64_t>(counts[0]);
        found.stats.n_exact += static_cast<int64_t>(counts[1]);
        passes.push_back(std::move(pass));
    }
    found.stats.n_bounded = n_everywhere_ * n_query;
    for (const Pass & pass : passes) {
        for (size_t i = 0; i + 1 < pass.offsets.size(); ++i) {
            const int64_t head = static_cast<int64_t>(i) / pass.n_gqa;
            const int64_t query = head * n_gqa + pass.first + static_cast<int64_t>(i) % pass.n_gqa;
            found.offsets[static_cast<size_t>(query) + 1] = pass.offsets[i + 1] - pass.offsets[i];
        }
    }
    for (size_t i = 1; i < found.offsets.size(); ++i) {
        found.offsets[i] += found.offsets[i - 1];
    }
    if (passes.size() == 1) {
        found.ids = std::move(passes[0].ids);
        found.scores = std::move(passes[0].scores);
    } else {
        found.ids = Memory(static_cast<size_t>(found.offsets.back()) * sizeof(int64_t));
        found.scores = Memory(static_cast<size_t>(found.offsets.back()) * sizeof(double));
        const auto copy = [](Memory & to, size_t at, const Memory & from, size_t begin, size_t end) {
            if (begin < end) {
                check(cudaMemcpyAsync(to.as<std::byte>(at * 8), from.as<std::byte>(begin * 8), (end - begin) * 8,
                                      cudaMemcpyDeviceToDevice, kStream),
                      "cudaMemcpy");
            }
        };
        for (const Pass & pass : passes) {
            for (int64_t head = 0; head < keys_.n_head_kv; ++head) {
                const size_t begin = static_cast<size_t>(pass.offsets[static_cast<size_t>(head * pass.n_gqa)]);
                const size_t end = static_cast<size_t>(pass.offsets[static_cast<size_t>((head + 1) * pass.n_gqa)]);
                const size_t at = static_cast<size_t>(found.offsets[static_cast<size_t>(head * n_gqa + pass.first)]);
                copy(found.ids, at, pass.ids, begin, end);
                copy(found.scores, at, pass.scores, begin, end);
            }
        }
    }
    check(cudaStreamSynchronize(kStream), "search");
    return found;
}

DeviceAttention DeviceIndex::attend(std::span<const float> queries, const StridedKeys & values, double epsilon, double scale,
                                    bool compensate) {
    const int64_t n_query = require_queries(queries);
    const char * obstacle = unsupported(cache_->keys(), plane_of(values));
    require(obstacle == nullptr, std::string("values: ") + (obstacle == nullptr ? "" : obstacle));
    require(values.n_head_kv == keys_.n_head_kv && values.n == keys_.n, "values are " + std::to_string(values.n_head_kv) +
                                                                            " heads of " + std::to_string(values.n) +
                                                                            " rows, accepted are those of the keys");
    require(keys_.n > 0, "the index is empty: there is nothing to attend to");
    require(epsilon >= 0 && epsilon < 1, "epsilon is " + std::to_string(epsilon) + ", accepted is [0, 1)");
    DeviceAttention result;
    const int64_t n_gqa = n_query / keys_.n_head_kv;
    const size_t row = static_cast<size_t>(values.dim) * sizeof(float);
    result.certificates.resize(static_cast<size_t>(n_query));
    result.dense.resize(static_cast<size_t>(n_query));

    const std::lock_guard lock(mutex_);
    const OnDevice on(device_);
    if (tiles_for(values.dim) > cache_->planes().n_tiles) {
        build(values.dim);
    }
    result.output = Memory(static_cast<size_t>(n_query) * row);
    const int most = most_gqa();
    for (int64_t first = 0; first < n_gqa; first += most) {
        const int n = static_cast<int>(std::min<int64_t>(most, n_gqa - first));
        Op op = lay_out(n, plane_of(values));
        require(fits(op.p), "attention over " + std::to_string(keys_.n) + " keys of " + std::to_string(n) +
                                " queries to a head wants more shared memory than the device has");
        Problem & p = op.p;
        p.to_log2 = static_cast<float>(scale * 1.4426950408889634);
        p.epsilon = static_cast<float>(epsilon);
        p.compensate = compensate;
        send(op.query, batch_of(queries, first, n));
        DecodeSettings settings;
        settings.sinks = settings.recent = 0;
        launch_sight(Mask{}, 1, 1, p.n_kv, settings, p.visible_stride, op.visible, op.sight, kStream);
        launch_summarize(p, cache_->planes().bounds, kStream);
        p.gave_up = op.dense;
        launch_attend(p, kStream);
        const size_t width = static_cast<size_t>(n) * row;
        check(cudaMemcpy2DAsync(result.output.as<std::byte>(static_cast<size_t>(first) * row), static_cast<size_t>(n_gqa) * row,
                                op.output, width, width, static_cast<size_t>(keys_.n_head_kv), cudaMemcpyDeviceToDevice, kStream),
              "cudaMemcpy2D");
        const std::vector<HeadCertificate> certificates = fetch(p.certificates, static_cast<size_t>(p.n_head));
        const std::vector<int32_t> dense = fetch(op.dense, static_cast<size_t>(p.n_group));
        for (int group = 0; group < p.n_group; ++group) {
            for (int i = 0; i < p.n_query_of(group); ++i) {
                const int64_t head = p.head_of(group, i);
                const size_t query = static_cast<size_t>(head / n * n_gqa + first + head % n);
                result.certificates[query] = certificates[static_cast<size_t>(head)];
                result.dense[query] = dense[static_cast<size_t>(group)] != 0 ? 1 : 0;
            }
        }
    }
    check(cudaStreamSynchronize(kStream), "attend");
    return result;
}

void DeviceIndex::poison() {
    const std::lock_guard lock(mutex_);
    const OnDevice on(device_);
    if (scratch_.bytes() > 0) {
        check(cudaMemset(scratch_.as<std::byte>(), 0xff, scratch_.bytes()), "poison");
    }
}

}  // namespace louver::cuda
