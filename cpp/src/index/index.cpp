#include "louver/index.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "index/ball_head.h"
#include "index/index_file.h"
#include "index/state.h"
#include "index/workers.h"
#include "kernels/kernels.h"
#include "oracle/threshold.h"

namespace louver {
namespace {

constexpr int64_t kMostPositions = std::numeric_limits<int32_t>::max();

// Every change is told to all of them; a caller that asks with ever new seeds shall not slow that down.
constexpr size_t kMostReservoirs = 64;

// Keys that one thread copies at a time.
constexpr int64_t kCopyKeys = 4096;

void require(bool holds, const std::string & message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

std::string given(const char * name, int64_t value, const std::string & accepted) {
    return std::string(name) + " is " + std::to_string(value) + ", accepted is " + accepted;
}

const char * name_of(DType type) {
    switch (type) {
        case DType::f32: return "float32";
        case DType::f16: return "float16";
        case DType::bf16: return "bfloat16";
        default: return "quantized";
    }
}

void set_bits(std::vector<uint64_t> & bits, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
        bits[static_cast<size_t>(i / kBlockCells)] |= uint64_t{1} << i % kBlockCells;
    }
}

bool has_bit(const std::vector<uint64_t> & bits, int64_t i) {
    return (bits[static_cast<size_t>(i / kBlockCells)] >> i % kBlockCells & 1) != 0;
}

// Each in range and there once.
void require_positions(std::span<const int64_t> positions, int64_t n) {
    std::vector<int64_t> sorted(positions.begin(), positions.end());
    std::sort(sorted.begin(), sorted.end());
    for (const int64_t position : sorted) {
        require(position >= 0 && position < n,
                "positions has " + std::to_string(position) + ", accepted is 0 to n_positions - 1 = " + std::to_string(n - 1));
    }
    const auto repeated = std::adjacent_find(sorted.begin(), sorted.end());
    require(repeated == sorted.end(),
            "positions has " + (repeated == sorted.end() ? "" : std::to_string(*repeated)) + " more than once");
}

void require_fits(const KeyStore & store, const StridedKeys & keys) {
    require(keys.type == store.type(),
            std::string("keys are ") + name_of(keys.type) + ", accepted is the index's " + name_of(store.type()));
    require(keys.n_head_kv == store.n_head_kv(),
            given("n_head_kv of keys", keys.n_head_kv, "the index's " + std::to_string(store.n_head_kv())));
    require(keys.dim == store.dim(), given("head_dim of keys", keys.dim, "the index's " + std::to_string(store.dim())));
    require(keys.n >= 0, given("number of keys", keys.n, "0 or more"));
}

void require_choice(const Oracle & oracle, double scale) {
    validate(oracle);
    require(scale > 0 && scale < 1e30, "scale is " + std::to_string(scale) + ", accepted is a number above 0 and below 1e30");
}

}  // namespace

Index::State::State(const IndexOptions & o, DType type, int n_head_kv, int dim) : options(o), store(type, 0, 1) {
    require(type == DType::f32 || type == DType::f16 || type == DType::bf16, "type of keys: accepted are f32, f16, bf16");
    require(dim >= 1 && dim <= kMaxDim, given("head_dim of keys", dim, "1 to 1024"));
    require(n_head_kv >= 1 && n_head_kv <= kMaxHeads, given("n_head_kv", n_head_kv, "1 to 1024"));
    require(o.n_threads >= 0 && o.n_threads <= 1024, given("n_threads", o.n_threads, "0 (all cores) to 1024"));
    if (o.kind == IndexKind::ball) {
        const BallOptions & ball = o.ball;
        require(ball.n_subspaces >= 1 && ball.n_subspaces <= dim,
                given("n_subspaces", ball.n_subspaces, "1 to head_dim = " + std::to_string(dim)));
        require(ball.group_size >= 1, given("group_size", ball.group_size, "1 or more"));
        require(ball.merge_at >= 1, given("merge_at", ball.merge_at, "1 or more"));
    }
    store = KeyStore(type, n_head_kv, dim);
    for (int h = 0; h < n_head_kv; ++h) {
        heads.push_back(o.kind == IndexKind::grid ? make_grid_head(dim, n_threads()) : std::make_unique<BallHead>(dim, o.ball));
    }
}

int Index::State::n_threads() const { return options.n_threads > 0 ? options.n_threads : hardware_threads(); }

Index::Index(const IndexOptions & options, DType type, int n_head_kv, int dim)
    : state_(std::make_unique<State>(options, type, n_head_kv, dim)) {}
Index::~Index() = default;
Index::Index(Index &&) noexcept = default;
Index & Index::operator=(Index &&) noexcept = default;

Index Index::borrow(const IndexOptions & options, const StridedKeys & keys, std::shared_ptr<const void> owner) {
    Index index(options, keys.type, keys.n_head_kv, keys.dim);
    State & s = *index.state_;
    require_fits(s.store, keys);
    require(keys.n <= kMostPositions, given("number of keys", keys.n, "at most " + std::to_string(kMostPositions)));
    require(keys.dim == 1 || keys.element_stride == static_cast<int64_t>(row_bytes(keys.type, 1)),
            "keys are not contiguous in their last dimension, which an index without a copy needs; accepted with a copy");
    s.store.borrow(keys, std::move(owner));
    s.live.assign(static_cast<size_t>(s.n_blocks()), 0);
    set_bits(s.live, 0, keys.n);
    s.n_live = keys.n;
    for (int h = 0; h < keys.n_head_kv; ++h) {
        HeadIndex & head = *s.heads[static_cast<size_t>(h)];
        head.reserve(keys.n);
        head.append(s.store.rows(h), 0, keys.n, s.live.data());
    }
    return index;
}

const IndexOptions & Index::options() const { return state_->options; }
DType Index::type() const { return state_->store.type(); }
int Index::n_head_kv() const { return state_->store.n_head_kv(); }
int Index::dim() const { return state_->store.dim(); }

int64_t Index::n_positions() const {
    const std::shared_lock lock(state_->mutex);
    return state_->store.size();
}

int64_t Index::n_live() const {
    const std::shared_lock lock(state_->mutex);
    return state_->n_live;
}

bool Index::is_live(int64_t position) const {
    const std::shared_lock lock(state_->mutex);
    return position >= 0 && position < state_->store.size() && has_bit(state_->live, position);
}

bool Index::is_borrowed() const {
    const std::shared_lock lock(state_->mutex);
    return state_->store.is_borrowed();
}

int64_t Index::append(const StridedKeys & keys) {
    State & s = *state_;
    std::shared_ptr<const void> last_owner;  // let go of after the lock
    const std::unique_lock lock(s.mutex);
    require_fits(s.store, keys);
    const int64_t first = s.store.size();
    require(keys.n <= kMostPositions - first,
            given("number of keys", first + keys.n, "at most " + std::to_string(kMostPositions) + " in all"));
    const int64_t n = first + keys.n;
    // What can fail comes first.
    last_owner = s.store.reserve(n);
    s.live.reserve(static_cast<size_t>(n_blocks_for(n)));
    for (auto & head : s.heads) {
        head->reserve(n);
    }
    s.live.resize(static_cast<size_t>(n_blocks_for(n)));
    s.store.set_size(n);
    parallel_for((keys.n + kCopyKeys - 1) / kCopyKeys, s.n_threads(), [&](int64_t part) {
        for (int64_t i = part * kCopyKeys; i < std::min(keys.n, (part + 1) * kCopyKeys); ++i) {
            s.store.set(first + i, keys, i);
        }
    });
    set_bits(s.live, first, n);
    s.n_live += keys.n;
    for (int h = 0; h < s.store.n_head_kv(); ++h) {
        s.heads[static_cast<size_t>(h)]->append(s.store.rows(h), first, n, s.live.data());
    }
    for (auto & [key, reservoir] : s.reservoirs) {
        reservoir.append(first, keys.n);
    }
    return first;
}

void Index::update(std::span<const int64_t> positions, const StridedKeys & keys) {
    State & s = *state_;
    std::shared_ptr<const void> last_owner;  // let go of after the lock
    const std::unique_lock lock(s.mutex);
    require_fits(s.store, keys);
    require(keys.n == static_cast<int64_t>(positions.size()),
            given("number of keys", keys.n, "that of positions, " + std::to_string(positions.size())));
    require_positions(positions, s.store.size());
    last_owner = s.store.reserve(s.store.size());  // its own, from now on
    for (size_t i = 0; i < positions.size(); ++i) {
        const int64_t position = positions[i];
        s.store.set(position, keys, static_cast<int64_t>(i));
        if (!has_bit(s.live, position)) {
            set_bits(s.live, position, position + 1);
            ++s.n_live;
            for (auto & [key, reservoir] : s.reservoirs) {
                reservoir.revive(position);
            }
        }
    }
    for (int h = 0; h < s.store.n_head_kv(); ++h) {
        s.heads[static_cast<size_t>(h)]->update(s.store.rows(h), s.store.size(), s.live.data(), positions);
    }
}

void Index::remove(std::span<const int64_t> positions) {
    State & s = *state_;
    const std::unique_lock lock(s.mutex);
    require_positions(positions, s.store.size());
    for (const int64_t position : positions) {
        require(has_bit(s.live, position), "positions has " + std::to_string(position) + ", which was removed before");
    }
    for (const int64_t position : positions) {
        s.live[static_cast<size_t>(position / kBlockCells)] &= ~(uint64_t{1} << position % kBlockCells);
        for (auto & [key, reservoir] : s.reservoirs) {
            reservoir.remove(position);
        }
    }
    s.n_live -= static_cast<int64_t>(positions.size());
    for (auto & head : s.heads) {
        head->remove(positions);
    }
}

void Index::rebuild() {
    State & s = *state_;
    const std::unique_lock lock(s.mutex);
    for (int h = 0; h < s.store.n_head_kv(); ++h) {
        s.heads[static_cast<size_t>(h)]->rebuild(s.store.rows(h), s.store.size(), s.live.data());
    }
}

Matches Index::search(std::span<const float> queries, std::span<const double> tau, const SearchOptions & options) const {
    const std::shared_lock lock(state_->mutex);
    return search_keys(*state_, QuerySet(*state_, queries), tau, options);
}

// The positions that the oracle samples, none if it does not.
std::vector<int64_t> Index::sample(const Oracle & oracle) const {
    if (!samples(oracle.kind)) {
        return {};
    }
    auto & reservoirs = state_->reservoirs;
    const std::unique_lock lock(state_->mutex);
    if (reservoirs.size() >= kMostReservoirs && !reservoirs.contains({oracle.n_samples, oracle.seed})) {
        reservoirs.clear();
    }
    const auto [at, is_new] = reservoirs.try_emplace({oracle.n_samples, oracle.seed}, oracle.n_samples, oracle.seed);
    if (is_new || (at->second.positions().empty() && state_->n_live > 0)) {
        at->second.restart(state_->live, state_->store.size());
    }
    return {at->second.positions().begin(), at->second.positions().end()};
}

Selection Index::select(std::span<const float> queries, const Oracle & oracle, double scale) const {
    require_choice(oracle, scale);
    const std::vector<int64_t> sample = this->sample(oracle);
    const std::shared_lock lock(state_->mutex);
    Selected selected = select_keys(*state_, QuerySet(*state_, queries), oracle, sample, scale);
    Selection selection;
    selection.matches.offsets.push_back(0);
    for (const Scored & keys : selected.keys) {
        selection.matches.ids.insert(selection.matches.ids.end(), keys.ids.begin(), keys.ids.end());
        selection.matches.scores.insert(selection.matches.scores.end(), keys.scores.begin(), keys.scores.end());
        selection.matches.offsets.push_back(static_cast<int64_t>(selection.matches.ids.size()));
        selection.matches.stats.n_exact += keys.n_exact;
    }
    selection.certificates = std::move(selected.certificates);
    for (const SelectionCertificate & certificate : selection.certificates) {
        selection.matches.stats.n_bounded += certificate.n_bounded;
        selection.matches.stats.n_scored += certificate.n_scored;
    }
    return selection;
}

Attention Index::attend(std::span<const float> queries, const StridedKeys & values, const Oracle & oracle, double scale,
                        bool compensate) const {
    require_choice(oracle, scale);
    const std::vector<int64_t> sample = this->sample(oracle);
    const std::shared_lock lock(state_->mutex);
    return attend_keys(*state_, QuerySet(*state_, queries), values, oracle, sample, scale, compensate);
}

std::vector<float> Index::key(int64_t position) const {
    const std::shared_lock lock(state_->mutex);
    const KeyStore & store = state_->store;
    require(position >= 0 && position < store.size(),
            given("position", position, "0 to n_positions - 1 = " + std::to_string(store.size() - 1)));
    std::vector<float> keys;
    std::vector<float> row(static_cast<size_t>(padded(store.dim())));
    const int32_t cell = static_cast<int32_t>(position);
    for (int h = 0; h < store.n_head_kv(); ++h) {
        kernels().rows_to_f32(store.rows(h), &cell, 1, row.data());
        keys.insert(keys.end(), row.begin(), row.begin() + store.dim());
    }
    return keys;
}

MemoryUsage Index::memory_usage() const {
    const std::shared_lock lock(state_->mutex);
    MemoryUsage usage;
    usage.keys = state_->store.bytes();
    for (const auto & head : state_->heads) {
        usage.index += head->bytes();
    }
    usage.other = state_->live.size() * sizeof(uint64_t);
    for (const auto & [key, reservoir] : state_->reservoirs) {
        usage.other += reservoir.positions().size() * sizeof(int64_t);
    }
    return usage;
}

void Index::save(const std::string & path) const {
    const State & s = *state_;
    const std::shared_lock lock(s.mutex);
    IndexContents contents;
    contents.options = s.options;
    contents.type = s.store.type();
    contents.n_head_kv = s.store.n_head_kv();
    contents.dim = s.store.dim();
    contents.n = s.store.size();
    contents.live = s.live;
    std::vector<Rows> keys;
    for (int h = 0; h < s.store.n_head_kv(); ++h) {
        keys.push_back(s.store.rows(h));
        if (const auto * ball = dynamic_cast<const BallHead *>(s.heads[static_cast<size_t>(h)].get())) {
            contents.groups.push_back(ball->groups(s.store.size()));
        }
    }
    write_index_file(path, contents, keys);
}

Index Index::load(const std::string & path, int n_threads) {
    IndexContents contents = read_index_file(path);
    contents.options.n_threads = n_threads;
    Index index(contents.options, contents.type, contents.n_head_kv, contents.dim);
    State & s = *index.state_;
    static_cast<void>(s.store.reserve(contents.n));
    s.store.set_size(contents.n);
    s.live = std::move(contents.live);
    for (const uint64_t bits : s.live) {
        s.n_live += std::popcount(bits);
    }
    for (int h = 0; h < contents.n_head_kv; ++h) {
        std::vector<std::byte> & keys = contents.keys[static_cast<size_t>(h)];
        std::copy(keys.begin(), keys.end(), const_cast<std::byte *>(s.store.rows(h).base));
        std::vector<std::byte>().swap(keys);
        HeadIndex & head = *s.heads[static_cast<size_t>(h)];
        head.reserve(contents.n);
        if (auto * ball = dynamic_cast<BallHead *>(&head)) {
            try {
                ball->restore(s.store.rows(h), contents.n, contents.groups[static_cast<size_t>(h)]);
            } catch (const std::invalid_argument & error) {
                throw IndexFileError(IndexFileError::Reason::corrupt, path + " is corrupt: " + error.what());
            }
        } else {
            head.append(s.store.rows(h), 0, contents.n, s.live.data());
        }
    }
    return index;
}

}  // namespace louver
