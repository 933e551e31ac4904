// The scan alone: for a search, whose references the caller gives, so that no key is read; and, on float16 caches, to be timed.
#include "cuda/scan.cuh"

#include "cuda/kernel.cuh"
#include "cuda/launch.h"

namespace louver::cuda {
namespace {

template <int n_tiles, int n_most> struct Scan {
    static constexpr int kWarps = n_tiles * n_most <= 16 ? 16 : 8;  // as the registers allow
    static constexpr int kChannels = 32 * n_tiles;
    using Ring = Stage<n_tiles, n_tiles <= 4 ? 2 : 1>;
    Queries<n_most, kChannels> queries;
    ScanShared<n_most, kWarps> scratch;
    StageArrivals arrivals[kWarps];
    alignas(16) Ring rings[kWarps];
};

// Nothing is kept but the bins.
struct KeepBins {
    const Problem & p;
    int group;

    __device__ __forceinline__ void words(int, const Words &) const {}
    __device__ __forceinline__ void longest(int, float) const {}
    __device__ __forceinline__ void bins(int, int block, int i, float, uint64_t of_cells) const {
        store_bins(p, group, i, block, of_cells);
    }
};

template <bool is_given, int n_tiles, int n_most> __global__ void __launch_bounds__(Scan<n_tiles, n_most>::kWarps * 32, 1)
    scan(const __grid_constant__ Problem p) {
    using Layout = Scan<n_tiles, n_most>;
    auto & s = *reinterpret_cast<Layout *>(shared_memory());
    const int group = static_cast<int>(blockIdx.y);
    const LoadedQuery<Layout::kChannels> query(p, group);
    const auto run = [&](const auto & probes) {
        bool begun;
        const OwnBlocks own = blocks_of(p, {group, 0, static_cast<int>(gridDim.x)}, static_cast<int>(blockIdx.x));
        const int warp = static_cast<int>(threadIdx.x) / 32;
        return scan_share<n_tiles>(p, group, own, query, probes, s.queries, s.scratch, s.rings[warp], s.arrivals[warp],
                                   KeepBins{p, group}, begun);
    };
    bool is_sound;
    if constexpr (is_given) {
        is_sound = run(NoProbes{});
    } else {
        is_sound = run(LoadedProbes<DType::f16, Layout::kChannels, Layout::kWarps>(p, group));
    }
    if (!is_sound && threadIdx.x == 0) {
        p.attend_all[group] = 1;
    }
}

// f.template operator()<n_tiles, n_most>()
template <class F> void with_tiles(const Problem & p, F && f) {
    const auto with = [&]<int n_tiles>() {
        p.n_shared <= kQuad ? f.template operator()<n_tiles, kQuad>() : f.template operator()<n_tiles, 2 * kQuad>();
    };
    switch (p.planes.n_tiles) {
        case 2: return with.template operator()<2>();
        case 3: return with.template operator()<3>();
        case 4: return with.template operator()<4>();
        default: return with.template operator()<8>();
    }
}

}  // namespace

void launch_scan(const Problem & p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(p.n_share / p.n_group), static_cast<unsigned>(p.n_group));
    with_tiles(p, [&]<int n_tiles, int n_most>() {
        using Layout = Scan<n_tiles, n_most>;
        const auto kernel = p.given != nullptr ? scan<true, n_tiles, n_most> : scan<false, n_tiles, n_most>;
        launch_kernel(kernel, {grid, Layout::kWarps * 32, sizeof(Layout)}, stream, p);
    });
}

}  // namespace louver::cuda
