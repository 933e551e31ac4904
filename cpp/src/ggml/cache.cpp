#include "ggml/cache.h"

#include <algorithm>

namespace louver {
namespace {

// The cost model of a KV head. A scan reads about a quarter of what dense attention reads, and survivors, which are gathered,
// cost a little more than cells in a row: above this share dense is cheaper. Whether it still is, is found out by a scan
// every so many steps.
constexpr double kUniformShare = 0.6;
constexpr uint8_t kStepsWithoutScan = 31;

}  // namespace

Cache::Cache(Runtime * owner_, int layer_id, const CachePlane & k_, const CachePlane & v_, int64_t cells_per_stream, int kv_heads)
    : owner(owner_),
      layer(layer_id),
      k(k_),
      v(v_),
      kv_size(cells_per_stream),
      n_stream(k_.n_rows / cells_per_stream),
      n_head_kv(kv_heads) {}

HostCache::HostCache(Runtime * owner_, int layer_id, const CachePlane & k_, const CachePlane & v_, int64_t cells_per_stream,
                     int kv_heads)
    : Cache(owner_, layer_id, k_, v_, cells_per_stream, kv_heads) {
    for (int64_t stream = 0; stream < n_stream; ++stream) {
        for (int head = 0; head < n_head_kv; ++head) {
            const auto rows = [&](const CachePlane & plane) {
                const size_t offset =
                    static_cast<size_t>(stream * kv_size) * plane.row_size + static_cast<size_t>(head) * plane.head_size;
                return Rows{plane.data + offset, static_cast<int64_t>(plane.row_size), plane.dim, plane.type};
            };
            key_rows.push_back(rows(k));
            value_rows.push_back(rows(v));
            indexes.push_back(std::make_unique<GridIndex>(k.dim, v.dim, kv_size));
            index_views.push_back(indexes.back().get());
        }
    }
    steps_without_scan.assign(static_cast<size_t>(n_stream * n_head_kv), 0);
}

void HostCache::invalidate(int64_t first, int64_t count) {
    if (owner->stale()) {
        return;
    }
    const int64_t end = std::min(first + count, n_stream * kv_size);
    for (int64_t row = first; row < end;) {
        const int64_t stream = row / kv_size;
        const int64_t stop = std::min(end, (stream + 1) * kv_size);
        for (int head = 0; head < n_head_kv; ++head) {
            index_of(stream, head).invalidate(row - stream * kv_size, stop - row);
        }
        row = stop;
    }
}

void HostCache::repair(int64_t stream, int block, uint64_t wanted, int64_t & blocks_built, int64_t & cells_encoded) {
    for (int head = 0; head < n_head_kv; ++head) {
        const GridIndex::Repair repair = index_of(stream, head).repair(block, wanted, keys(stream)[head], values(stream)[head]);
        blocks_built += repair.rebuilt;
        cells_encoded += repair.encoded;
    }
}

void HostCache::collect() {
    if (!step.pending) {
        return;
    }
    step.pending = false;
    Stats part;
    for (const CheckCounts & counts : step.checked) {
        part.checked += counts;
    }
    for (size_t i = 0; i < step.blocks_built.size(); ++i) {
        part.blocks_built += step.blocks_built[i];
        part.cells_encoded += step.cells_encoded[i];
    }
    const int64_t row_pair = static_cast<int64_t>(k.head_size + v.head_size);
    const int64_t n_gqa = n_head_kv > 0 ? step.n_head / n_head_kv : 1;
    step.attended.assign(steps_without_scan.size(), 0);
    step.visible.assign(steps_without_scan.size(), 0);
    for (size_t q = 0; q < step.queries.size(); ++q) {
        const Step::Query & query = step.queries[q];
        ++part.attention[static_cast<size_t>(query.path)];
        if (query.reason != Reason::none) {
            ++part.reasons[static_cast<size_t>(query.path)][static_cast<size_t>(query.reason)];
        }
        for (int h = 0; h < step.n_head; ++h) {
            const HeadCertificate & certificate =
                step.certificates[q * static_cast<size_t>(step.n_head) + static_cast<size_t>(h)];
            ++part.n_queries;
            part.keys_visible += certificate.n_visible;
            part.keys_scanned += certificate.n_scanned;
            part.keys_attended += certificate.n_attended;
            part.delta_sum += static_cast<double>(certificate.delta);
            part.delta_max = std::max(part.delta_max, static_cast<double>(certificate.delta));
            part.error_bound_max = std::max(part.error_bound_max, static_cast<double>(certificate.error_bound));
            if (h % n_gqa == 0) {  // the heads of a group read together
                if (query.path == Path::louver) {
                    const size_t head = static_cast<size_t>(query.stream * n_head_kv + h / n_gqa);
                    part.heads_uniform += steps_without_scan[head] > 0 ? n_gqa : 0;
                    step.attended[head] += certificate.n_attended;
                    step.visible[head] += certificate.n_visible;
                }
                const int64_t block_bytes = static_cast<int64_t>(indexes.front()->block_bytes());
                part.bytes_read += certificate.n_scanned * block_bytes / kBlockCells + certificate.n_attended * row_pair;
                part.bytes_dense += certificate.n_visible * row_pair;
            }
        }
    }
    for (size_t head = 0; head < steps_without_scan.size(); ++head) {
        uint8_t & left = steps_without_scan[head];
        if (step.visible[head] > 0) {  // Louver's in this step
            const bool uniform =
                static_cast<double>(step.attended[head]) > kUniformShare * static_cast<double>(step.visible[head]);
            left = left > 0 ? static_cast<uint8_t>(left - 1) : uniform ? kStepsWithoutScan : uint8_t{0};
        }
    }
    owner->add(part);
}

void HostCache::expect(const DecodeSettings & settings) {
    if (settings.check || settings.epsilon != uniform_at) {
        std::fill(steps_without_scan.begin(), steps_without_scan.end(), uint8_t{0});
        uniform_at = settings.epsilon;
    }
}

void HostCache::describe(Stats & stats) const {
    for (const auto & index : indexes) {
        const int64_t cells = index->indexed_cells();
        stats.index_cells += cells;
        stats.index_bytes += static_cast<int64_t>(index->bytes());
        stats.cache_bytes += cells * static_cast<int64_t>(k.head_size + v.head_size);
    }
    for (size_t q = 0; q < step.queries.size(); ++q) {
        const Step::Query & query = step.queries[q];
        const auto first = step.certificates.begin() + static_cast<std::ptrdiff_t>(q) * step.n_head;
        stats.last_step.push_back({layer, query.stream, query.token, query.path, {first, first + step.n_head}});
    }
}

}  // namespace louver
