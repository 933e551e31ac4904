#include "cuda/attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>

#include "cuda/launch.h"

namespace louver::cuda {
namespace {

cudaStream_t as_stream(void * stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

std::vector<Device> devices() {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        cudaGetLastError();  // no driver: not an error here
        return {};
    }
    std::vector<Device> all;
    for (int id = 0; id < n; ++id) {
        cudaDeviceProp properties{};
        check(cudaGetDeviceProperties(&properties, id), "cudaGetDeviceProperties");
        all.push_back({id, properties.name, properties.major, properties.minor, properties.multiProcessorCount});
    }
    return all;
}

const char * unsupported(const Plane & keys, const Plane & values) {
    if (keys.type != values.type) {
        return "keys and values are stored in different formats";
    }
    if (keys.type == DType::q4_0) {
        return "the cache's format has no CUDA kernels";
    }
    for (const Plane * plane : {&keys, &values}) {
        if (plane->dim < 8 || plane->dim > kMaxKernelDim || plane->dim % 8 != 0) {
            return "the head dimension is not a multiple of 8 up to 256";
        }
        const uintptr_t unit = plane->type == DType::q8_0 ? 2 : 16;
        if ((reinterpret_cast<uintptr_t>(plane->data) | static_cast<uintptr_t>(plane->row_stride) |
             static_cast<uintptr_t>(plane->head_stride)) %
                unit !=
            0) {
            return "rows are not aligned to 16 bytes";
        }
    }
    return nullptr;
}

struct CacheIndex::Storage {
    Memory memory;
    int32_t * queued = nullptr;
    uint8_t * without_scan = nullptr;
    HeadCertificate * certificates = nullptr;
    Totals * totals = nullptr;
    int64_t n_certificates = 0;
};

CacheIndex::CacheIndex(int device, const Plane & keys, const Plane & values, int n_stream, int n_head_kv, int64_t kv_size,
                       int n_gqa, int widest)
    : device_(device),
      keys_(keys),
      values_(values),
      n_stream_(n_stream),
      kv_size_(kv_size),
      storage_(std::make_unique<Storage>()) {
    planes_.key_dim = keys.dim;
    planes_.value_dim = values.dim;
    planes_.n_tiles = tiles_for(std::max({keys.dim, values.dim, widest}));
    planes_.n_head_kv = n_head_kv;
    planes_.n_blocks = n_blocks_for(kv_size);
    const size_t slots = static_cast<size_t>(n_stream) * static_cast<size_t>(n_head_kv) * static_cast<size_t>(planes_.n_blocks);
    const auto lay = [&](std::byte * base) {
        Parts parts(base);
        planes_.codes = parts.take<int8_t>(slots * static_cast<size_t>(planes_.codes_per_block()));
        planes_.grid = parts.take<uint16_t>(slots * static_cast<size_t>(2 * planes_.width()));
        planes_.means = parts.take<uint16_t>(slots * static_cast<size_t>(values.dim));
        planes_.bounds = parts.take<BlockBounds>(slots);
        planes_.indexed = parts.take<uint64_t>(slots);
        planes_.not_finite = parts.take<uint64_t>(slots);
        storage_->queued = parts.take<int32_t>(slots);
        storage_->without_scan = parts.take<uint8_t>(static_cast<size_t>(n_stream) * static_cast<size_t>(n_head_kv * n_gqa));
        storage_->n_certificates = static_cast<int64_t>(kMaxRows) * n_head_kv * n_gqa;
        storage_->certificates = parts.take<HeadCertificate>(static_cast<size_t>(storage_->n_certificates));
        storage_->totals = parts.take<Totals>(1);
        return parts.bytes();
    };
    const OnDevice on(device);
    storage_->memory = Memory(lay(nullptr));
    lay(storage_->memory.as<std::byte>());
}

CacheIndex::~CacheIndex() {
    int before = 0;
    if (cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device_) == cudaSuccess) {
        storage_.reset();
        cudaSetDevice(before);
    }
}

size_t CacheIndex::bytes() const {
    return planes_.block_bytes() * static_cast<size_t>(n_stream_) * static_cast<size_t>(planes_.n_head_kv) *
           static_cast<size_t>(planes_.n_blocks);
}

size_t CacheIndex::bytes_per_cell() const { return planes_.block_bytes() / kBlockCells; }

void CacheIndex::build(int stream_of_cache, int64_t n_cells, void * stream) {
    const OnDevice on(device_);
    launch_build(planes_, keys_, values_, kv_size_, stream_of_cache, n_cells, storage_->totals, as_stream(stream));
}

namespace {

WriteTarget target_of(const CacheIndex & index, int64_t first_row) {
    const Planes & planes = index.planes();
    return {planes.indexed, planes.not_finite, index.kv_size(), first_row, index.n_stream(), planes.n_head_kv, planes.n_blocks};
}

}  // namespace

void CacheIndex::invalidate(int64_t first, int64_t count) {
    const OnDevice on(device_);
    check(cudaDeviceSynchronize(), "invalidate");
    launch_invalidate(target_of(*this, 0), first, count, cudaStreamPerThread);
    check(cudaStreamSynchronize(cudaStreamPerThread), "invalidate");
}

void write_range(const CacheIndex & index, int64_t first, int64_t count, void * stream) {
    launch_invalidate(target_of(index, 0), first, count, as_stream(stream));
}

void write_rows(const std::vector<CacheIndex::Target> & all, const void * rows, bool wide, int n_rows, void * stream) {
    for (size_t first = 0; first < all.size(); first += kMaxTargets) {
        WriteTargets targets;
        for (size_t i = first; i < std::min(all.size(), first + kMaxTargets); ++i) {
            targets.target[targets.n++] = target_of(*all[i].index, all[i].first_row);
        }
        launch_invalidate(targets, rows, wide, n_rows, as_stream(stream));
    }
}

Totals CacheIndex::totals() const {
    const OnDevice on(device_);
    Totals totals{};
    check(cudaDeviceSynchronize(), "totals");
    check(cudaMemcpy(&totals, storage_->totals, sizeof(totals), cudaMemcpyDeviceToHost), "totals");
    return totals;
}

void CacheIndex::reset_totals() {
    const OnDevice on(device_);
    check(cudaDeviceSynchronize(), "reset_totals");
    check(cudaMemset(storage_->totals, 0, sizeof(Totals)), "reset_totals");
}

std::vector<HeadCertificate> CacheIndex::certificates(int64_t n) const {
    const OnDevice on(device_);
    std::vector<HeadCertificate> all(static_cast<size_t>(std::min(n, storage_->n_certificates)));
    check(cudaDeviceSynchronize(), "certificates");
    check(cudaMemcpy(all.data(), storage_->certificates, all.size() * sizeof(HeadCertificate), cudaMemcpyDeviceToHost),
          "certificates");
    return all;
}

int64_t CacheIndex::indexed_cells() const {
    const OnDevice on(device_);
    std::vector<uint64_t> words(static_cast<size_t>(planes_.slot(n_stream_, 0, 0)));
    check(cudaDeviceSynchronize(), "indexed_cells");
    check(cudaMemcpy(words.data(), planes_.indexed, words.size() * sizeof(uint64_t), cudaMemcpyDeviceToHost), "indexed_cells");
    int64_t n = 0;
    for (const uint64_t word : words) {
        n += std::popcount(word);
    }
    return n;
}

struct Workspace::Storage {
    struct Room {
        int64_t n_query = 0;  // of (row, head part) pairs the queries of a group are counted in full
        int64_t n_group = 0;
        int64_t n_row = 0;
        int64_t n_blocks = 0;
        int64_t n_slot = 0;
    } room;
    Memory memory;

    // Zero between ops, at places that do not depend on the shape.
    void lay_zeros(Parts & parts, Problem & p) const {
        p.attend_all = parts.take<int32_t>(static_cast<size_t>(room.n_group));
        p.arrived = parts.take<int32_t>(static_cast<size_t>(room.n_group));
        p.combined = parts.take<int32_t>(static_cast<size_t>(room.n_group));
        p.n_pending = parts.take<int32_t>(static_cast<size_t>(room.n_group));
        p.check_sums = parts.take<double>(2 * static_cast<size_t>(room.n_query));
    }

    std::deque<Memory> retired;  // captured graphs that were not yet replaced, and kernels under way, may still use it
};

Workspace::Workspace(int device) : device_(device), storage_(std::make_unique<Storage>()) {
    check(cudaDeviceGetAttribute(&n_processors_, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    most_shared_ = most_shared_of(device);
}

Workspace::~Workspace() {
    int before = 0;
    if (cudaGetDevice(&before) == cudaSuccess && cudaSetDevice(device_) == cudaSuccess) {
        storage_.reset();
        cudaSetDevice(before);
    }
}

namespace {

struct Groups {
    int n_part;
    int n_shared;
};
Groups groups_of(int n_gqa) {
    const int n_part = (n_gqa + kMaxShared - 1) / kMaxShared;
    return {n_part, (n_gqa + n_part - 1) / n_part};
}

}  // namespace

void Workspace::reserve(const CacheIndex & index, int n_head, int n_row) {
    const Groups groups = groups_of(n_head / index.n_head_kv());
    const int64_t n_group = static_cast<int64_t>(n_row) * index.n_head_kv() * groups.n_part;
    Storage & s = *storage_;
    const int64_t n_slot = index.planes().slot(index.n_stream(), 0, 0);
    if (n_group * groups.n_shared <= s.room.n_query && n_group <= s.room.n_group && n_row <= s.room.n_row &&
        index.planes().n_blocks <= s.room.n_blocks && n_slot <= s.room.n_slot) {
        return;
    }
    // As problem() lays it out, for the largest shape in each respect.
    Storage::Room room = s.room;
    room.n_query = std::max(room.n_query, n_group * groups.n_shared);
    room.n_group = std::max(room.n_group, n_group);
    room.n_row = std::max<int64_t>(room.n_row, n_row);
    room.n_blocks = std::max<int64_t>(room.n_blocks, index.planes().n_blocks);
    room.n_slot = std::max(room.n_slot, n_slot);
    const size_t q = static_cast<size_t>(room.n_query);
    const size_t g = static_cast<size_t>(room.n_group);
    const size_t blocks = static_cast<size_t>(room.n_blocks);
    const size_t cells = blocks * kBlockCells;
    const size_t shares = static_cast<size_t>(n_processors_) + g * kMostRounds;  // of all groups together
    const size_t bytes = q * (64 + cells) + g * (64 + blocks * (16 + bytes_of_share_block(kMaxShared))) +
                         shares * (sizeof(ShareCounts) + kMaxShared * sizeof(ShareHead) + kPartStride * sizeof(float)) +
                         static_cast<size_t>(room.n_slot) * 4 +
                         static_cast<size_t>(room.n_row) * (sizeof(Sight) + (blocks + 1) * 8) + 32 * 256;
    const OnDevice on(device_);
    Memory memory(bytes);
    s.room = room;
    if (s.memory.bytes() > 0) {
        s.retired.push_back(std::move(s.memory));
    }
    s.memory = std::move(memory);
    ++generation_;
}

Problem Workspace::problem(const CacheIndex & index, const AttentionOp & op) {
    const Storage & s = *storage_;
    Problem p{};
    const int n_gqa = op.n_head / index.n_head_kv();
    const Groups groups = groups_of(n_gqa);
    p.n_token = op.n_token;
    p.n_stream = op.n_stream;
    p.first_stream = op.first_stream;
    p.n_head = op.n_head;
    p.n_head_kv = index.n_head_kv();
    p.n_gqa = n_gqa;
    p.n_part = groups.n_part;
    p.n_group_of_row = p.n_head_kv * groups.n_part;
    p.n_shared = groups.n_shared;
    p.n_group = op.n_token * op.n_stream * p.n_group_of_row;
    p.n_kv = op.n_kv;
    p.n_blocks = n_blocks_for(op.n_kv);
    p.kv_size = index.kv_size();
    p.to_log2 = static_cast<float>(static_cast<double>(op.scale) * 1.4426950408889634);
    p.query = op.query;
    p.query_token_stride = op.query_token_stride;
    p.query_head_stride = op.query_head_stride;
    p.query_stream_stride = op.query_stream_stride;
    p.output = op.output;
    p.output_token_stride = op.output_token_stride;
    p.output_head_stride = op.output_head_stride;
    p.output_stream_stride = op.output_stream_stride;
    p.mask = op.mask;
    p.keys = index.keys();
    p.values = index.values();
    p.planes = index.planes();
    p.epsilon = static_cast<float>(op.settings.epsilon);
    p.certified = op.settings.certified;
    p.compensate = op.settings.compensate;
    p.check = op.settings.check;
    p.spares_uniform = !op.settings.check && op.settings.epsilon > 0;
    p.share_out(n_processors_);
    p.most_shared = most_shared_;

    Parts parts(s.memory.as<std::byte>());
    s.lay_zeros(parts, p);
    // Seen once for several ops.
    Sight * sight = parts.take<Sight>(static_cast<size_t>(s.room.n_row));
    uint64_t * visible = parts.take<uint64_t>(static_cast<size_t>(s.room.n_row * (s.room.n_blocks + 1)));
    p.sight = sight;
    p.visible = visible;
    p.visible_stride = s.room.n_blocks + 1;
    // Of one op.
    const size_t q = static_cast<size_t>(p.n_group) * static_cast<size_t>(p.n_shared);
    const size_t g = static_cast<size_t>(p.n_group);
    const size_t blocks = static_cast<size_t>(p.n_blocks);
    const size_t shares = static_cast<size_t>(p.n_share);
    p.pending = parts.take<int32_t>(static_cast<size_t>(s.room.n_slot));
    p.reference = parts.take<float>(q);
    p.bins = parts.take<uint8_t>(q * blocks * kBlockCells);
    p.far_cells = parts.take<std::byte>(g * blocks * bytes_of_share_block(kMaxShared));
    p.kept = parts.take<uint64_t>(g * blocks);
    p.bounded = parts.take<uint64_t>(g * blocks);
    p.counts = parts.take<ShareCounts>(shares);
    p.of_share = parts.take<ShareHead>(shares * kMaxShared);
    p.part = parts.take<float>(shares * kPartStride);
    if (parts.bytes() > s.memory.bytes()) {
        throw Error("louver: the CUDA workspace is smaller than an op needs (" + std::to_string(s.memory.bytes()) + " of " +
                    std::to_string(parts.bytes()) + " bytes)");
    }
    p.queued = index.storage_->queued;
    p.without_scan = index.storage_->without_scan;
    p.certificates = index.storage_->certificates;
    p.totals = index.storage_->totals;
    return p;
}

void Workspace::see(const CacheIndex & index, const AttentionOp & op, void * stream) {
    reserve(index, op.n_head, op.n_token * op.n_stream);
    const Problem p = problem(index, op);
    launch_sight(op.mask, op.n_token, op.n_stream, op.n_kv, op.settings, p.visible_stride, const_cast<uint64_t *>(p.visible),
                 const_cast<Sight *>(p.sight), as_stream(stream));
}

void Workspace::attend(const CacheIndex & index, const AttentionOp & op, void * stream) {
    const Problem p = problem(index, op);
    launch_attend(p, as_stream(stream));
    if (p.check) {
        launch_check(p, as_stream(stream));
    }
}

void Workspace::scan(const CacheIndex & index, const AttentionOp & op, void * stream) {
    Problem p = problem(index, op);
    p.queued = nullptr;  // nothing is noted
    launch_scan(p, as_stream(stream));
}

size_t Workspace::least_shared(const CacheIndex & index, const AttentionOp & op) { return attend_bytes(problem(index, op)); }

bool Workspace::fits(const CacheIndex & index, const AttentionOp & op) { return cuda::fits(problem(index, op)); }

void Workspace::repair(const CacheIndex & index, const AttentionOp & op, void * stream) {
    launch_repair(problem(index, op), as_stream(stream));
}

void Workspace::poison() {
    const OnDevice on(device_);
    Parts parts(nullptr);
    Problem zeros{};
    storage_->lay_zeros(parts, zeros);
    const size_t first = parts.bytes();
    check(cudaDeviceSynchronize(), "poison");
    check(cudaMemset(storage_->memory.as<std::byte>(first), 0xff, storage_->memory.bytes() - first), "poison");
}

std::vector<uint64_t> Workspace::kept(const CacheIndex & index, const AttentionOp & op) const {
    const OnDevice on(device_);
    const Problem p = const_cast<Workspace *>(this)->problem(index, op);
    std::vector<uint64_t> bits(static_cast<size_t>(p.n_group) * static_cast<size_t>(p.n_blocks));
    check(cudaDeviceSynchronize(), "kept");
    check(cudaMemcpy(bits.data(), p.kept, bits.size() * sizeof(uint64_t), cudaMemcpyDeviceToHost), "kept");
    return bits;
}

}  // namespace louver::cuda
