// A cache in a GPU's memory. Its counts and certificates stay there until somebody asks: a captured CUDA graph runs no code of
// the host.
#pragma once

#include <memory>
#include <set>

#include "cuda/attention.h"
#include "ggml/attention_view.h"
#include "ggml/cache.h"

namespace louver {

struct DeviceCache final : Cache {
    // Throws cuda::Error where the device has no room for the index.
    DeviceCache(Runtime * owner, int device, const AttentionView & view);

    bool on_host() const override { return false; }
    void invalidate(int64_t first, int64_t count) override;
    void collect() override;
    void describe(Stats & stats) const override;

    cuda::CacheIndex index;
    std::set<std::shared_ptr<cuda::Workspace>> workspaces;  // of the streams that attend to it
    int n_head;
    // Whether the index took part in every op lately. Stock's steps do not tell it which blocks are complete.
    bool is_current = false;

    // The last op, if it was not stock's.
    struct Step {
        Path path = Path::louver;
        int n_token = 0;  // of each of n_stream; 0: none
        int n_stream = 0;
        int first_stream = 0;
    };
    Step step;
};

// Rows of a plane as the kernels want them.
cuda::Plane device_plane(const CachePlane & plane);

}  // namespace louver
