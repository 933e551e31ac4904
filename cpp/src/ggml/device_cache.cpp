#include "ggml/device_cache.h"

namespace louver {

cuda::Plane device_plane(const CachePlane & plane) {
    return {plane.data, static_cast<int64_t>(plane.row_size), static_cast<int64_t>(plane.head_size), plane.dim, plane.type};
}

DeviceCache::DeviceCache(Runtime * owner_, int device, const AttentionView & view)
    : Cache(owner_, view.layer(), view.k_plane(), view.v_plane(), view.kv_size, view.n_head_kv),
      index(device, device_plane(k), device_plane(v), static_cast<int>(n_stream), n_head_kv, kv_size,
            view.n_head / view.n_head_kv),
      n_head(view.n_head) {}

void DeviceCache::invalidate(int64_t first, int64_t count) {
    if (!owner->stale()) {
        index.invalidate(first, count);
    }
}

void DeviceCache::collect() {
    const cuda::Totals t = index.totals();
    index.reset_totals();
    const auto number = [](unsigned long long n) { return static_cast<int64_t>(n); };
    Stats part;
    part.attention[static_cast<size_t>(Path::louver)] = number(t.tokens[1]);
    part.attention[static_cast<size_t>(Path::dense)] = number(t.tokens[0]);
    part.reasons[static_cast<size_t>(Path::dense)][static_cast<size_t>(Reason::epsilon_zero)] = number(t.tokens[0]);
    part.n_queries = number(t.queries);
    part.heads_uniform = number(t.uniform);
    part.heads_in_full = number(t.not_finite + t.not_plain);
    part.keys_visible = number(t.visible);
    part.keys_scanned = number(t.scanned);
    part.keys_attended = number(t.attended);
    const int64_t row_pair = static_cast<int64_t>(k.head_size + v.head_size);
    part.bytes_read =
        number(t.group_scanned) * static_cast<int64_t>(index.bytes_per_cell()) + number(t.group_attended) * row_pair;
    part.bytes_dense = number(t.group_visible) * row_pair;
    part.delta_sum = t.delta_sum;
    part.delta_max = t.delta_max;
    part.error_bound_max = t.error_bound_max;
    part.checked = {number(t.pairs), number(t.misses), number(t.bound_violations), number(t.mass_violations)};
    part.blocks_built = number(t.blocks_built);
    part.cells_encoded = number(t.cells_encoded);
    owner->add(part);
}

void DeviceCache::describe(Stats & stats) const {
    const int64_t cells = index.indexed_cells();
    stats.index_cells += cells;
    stats.index_bytes += cells * static_cast<int64_t>(index.bytes_per_cell());
    stats.cache_bytes += cells * static_cast<int64_t>(k.head_size + v.head_size);
    const int64_t n = static_cast<int64_t>(step.n_token) * step.n_stream;
    const std::vector<HeadCertificate> all = index.certificates(n * n_head);
    for (int64_t row = 0; row < n; ++row) {
        const auto first = all.begin() + row * n_head;
        stats.last_step.push_back({layer,
                                   step.first_stream + static_cast<int>(row / step.n_token),
                                   static_cast<int>(row % step.n_token),
                                   step.path,
                                   {first, first + n_head}});
    }
}

}  // namespace louver
