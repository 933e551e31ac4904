// Search: candidates from the bounds, block by block, then exact scores. Chunks of blocks are dealt to threads.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

#include "index/scorer.h"
#include "index/state.h"
#include "index/workers.h"
#include "kernels/kernels.h"

namespace louver {
namespace {

// Blocks of one piece of work.
constexpr int kChunk = 4 * kMaxRun;

constexpr int kRunCells = kMaxRun * kBlockCells;

class Search {
  public:
    Search(const Index::State & state, const QuerySet & queries, std::span<const double> tau, const SearchOptions & options)
        : s_(state),
          queries_(queries),
          tau_(tau),
          options_(options),
          n_blocks_(state.n_blocks()),
          n_chunks_((n_blocks_ + kChunk - 1) / kChunk) {
        const size_t n = static_cast<size_t>(queries.n());
        found_.resize(n * static_cast<size_t>(n_chunks_));
        bounded_.assign(n, 0);
        if (options.method != SearchMethod::sum) {
            preselect();
        }
    }

    void run() {
        const int64_t n_batches = static_cast<int64_t>(queries_.batches().size());
        parallel_for(n_batches * n_chunks_, s_.n_threads(), [&](int64_t unit) {
            search_chunk(queries_.batches()[static_cast<size_t>(unit / n_chunks_)], static_cast<int>(unit % n_chunks_));
        });
    }

    // The same by query, not as a caller outside wants it.
    std::vector<Scored> by_query() {
        std::vector<Scored> all(static_cast<size_t>(queries_.n()));
        for (size_t i = 0; i < found_.size(); ++i) {
            Scored & to = all[i / static_cast<size_t>(n_chunks_)];
            to.ids.insert(to.ids.end(), found_[i].ids.begin(), found_[i].ids.end());
            to.scores.insert(to.scores.end(), found_[i].scores.begin(), found_[i].scores.end());
            to.magnitudes.insert(to.magnitudes.end(), found_[i].magnitudes.begin(), found_[i].magnitudes.end());
            to.n_scored += found_[i].n_scored;
        }
        return all;
    }

    Matches gather() {
        Matches matches;
        matches.offsets.push_back(0);
        size_t total = 0;
        for (const Scored & part : found_) {
            total += part.ids.size();
            matches.stats.n_scored += part.n_scored;
            matches.stats.n_exact += part.n_exact;
        }
        matches.ids.reserve(total);
        matches.scores.reserve(total);
        for (int query = 0; query < queries_.n(); ++query) {
            for (int chunk = 0; chunk < n_chunks_; ++chunk) {
                const Scored & part = found(query, chunk);
                matches.ids.insert(matches.ids.end(), part.ids.begin(), part.ids.end());
                matches.scores.insert(matches.scores.end(), part.scores.begin(), part.scores.end());
            }
            matches.offsets.push_back(static_cast<int64_t>(matches.ids.size()));
            matches.stats.n_bounded += bounded_[static_cast<size_t>(query)];
        }
        return matches;
    }

  private:
    // [n_query][n_blocks]
    void preselect() {
        const size_t n_blocks = static_cast<size_t>(n_blocks_);
        preselected_.assign(static_cast<size_t>(queries_.n()) * n_blocks, 0);
        const size_t n_subspaces = static_cast<size_t>(s_.options.ball.n_subspaces);
        parallel_for(queries_.n(), s_.n_threads(), [&](int64_t i) {
            for (const QuerySet::Batch & batch : queries_.batches()) {
                const int at = static_cast<int>(i) - batch.first;
                if (at >= 0 && at < batch.n) {
                    const size_t q = static_cast<size_t>(i);
                    const double * subspace_tau =
                        options_.subspace_tau.empty() ? nullptr : options_.subspace_tau.data() + q * n_subspaces;
                    batch.query->preselect(options_.method, at, tau_[q], subspace_tau,
                                           std::span(preselected_).subspan(q * n_blocks, n_blocks));
                }
            }
        });
    }

    void search_chunk(const QuerySet::Batch & batch, int chunk) {
        const HeadIndex & head = *s_.heads[static_cast<size_t>(batch.head)];
        const int end = std::min(n_blocks_, (chunk + 1) * kChunk);
        // While the rows of one run's candidates are on their way, the next run is bounded.
        int32_t cells[2][kMaxBatch][kRunCells];
        int n_cells[2][kMaxBatch] = {};
        int64_t n_bounded[kMaxBatch] = {};
        int turn = 0;
        for (int first = chunk * kChunk; first < end; first += kMaxRun, turn = 1 - turn) {
            const int count = std::min(kMaxRun, end - first);
            uint64_t live[kMaxBatch * kMaxRun];
            uint64_t candidates[kMaxBatch * kMaxRun];
            for (int i = 0; i < batch.n; ++i) {
                for (int b = 0; b < count; ++b) {
                    const uint64_t indexed = s_.live[static_cast<size_t>(first + b)] & head.indexed(first + b);
                    live[i * count + b] = s_.live[static_cast<size_t>(first + b)] & ~indexed;
                    candidates[i * count + b] = indexed & preselected(batch.first + i, first + b);
                    n_bounded[i] += std::popcount(indexed);
                }
            }
            batch.query->candidates(first, count, tau_.data() + batch.first, candidates);
            for (int i = 0; i < batch.n; ++i) {
                int n = 0;
                for (int b = 0; b < count; ++b) {
                    for (uint64_t left = candidates[i * count + b] | live[i * count + b]; left != 0; left &= left - 1) {
                        cells[turn][i][n++] = (first + b) * kBlockCells + std::countr_zero(left);
                    }
                }
                n_cells[turn][i] = n;
                prefetch(batch.head, cells[turn][i], n);
            }
            score(batch, chunk, cells[1 - turn], n_cells[1 - turn]);
        }
        score(batch, chunk, cells[1 - turn], n_cells[1 - turn]);
        for (int i = 0; i < batch.n; ++i) {
            std::atomic_ref(bounded_[static_cast<size_t>(batch.first + i)]).fetch_add(n_bounded[i], std::memory_order_relaxed);
        }
    }

    uint64_t preselected(int query, int block) const {
        return preselected_.empty()
                   ? ~uint64_t{0}
                   : preselected_[static_cast<size_t>(query) * static_cast<size_t>(n_blocks_) + static_cast<size_t>(block)];
    }

    void prefetch(int head, const int32_t * cells, int n) const {
        const Rows & keys = s_.store.rows(head);
        const int64_t bytes = static_cast<int64_t>(row_bytes(keys.type, keys.dim));
        for (int i = 0; i < n; ++i) {
            for (int64_t offset = 0; offset < bytes; offset += 64) {
                __builtin_prefetch(keys.row(cells[i]) + offset, 0, 2);
            }
        }
    }

    void score(const QuerySet::Batch & batch, int chunk, const int32_t (*cells)[kRunCells], int * n_cells) {
        for (int i = 0; i < batch.n; ++i) {
            const int query = batch.first + i;
            const size_t q = static_cast<size_t>(query);
            const bool filters = options_.method == SearchMethod::filter;
            const int n_subspaces = s_.options.ball.n_subspaces;
            const Scorer scorer(s_.store.rows(batch.head), queries_.f32(query), queries_.f64(query),
                                filters ? options_.subspace_tau.data() + q * static_cast<size_t>(n_subspaces) : nullptr,
                                n_subspaces);
            scorer.add_matches(cells[i], n_cells[i], tau_[q], found(query, chunk));
            n_cells[i] = 0;
        }
    }

    Scored & found(int query, int chunk) {
        return found_[static_cast<size_t>(query) * static_cast<size_t>(n_chunks_) + static_cast<size_t>(chunk)];
    }

    const Index::State & s_;
    const QuerySet & queries_;
    std::span<const double> tau_;
    const SearchOptions & options_;
    int n_blocks_;
    int n_chunks_;
    std::vector<uint64_t> preselected_;
    std::vector<Scored> found_;     // [n_query][n_chunks]
    std::vector<int64_t> bounded_;  // [n_query]
};

void validate(const Index::State & s, const QuerySet & queries, std::span<const double> tau, const SearchOptions & options) {
    const auto require = [](bool holds, const std::string & message) {
        if (!holds) {
            throw std::invalid_argument(message);
        }
    };
    const size_t n = static_cast<size_t>(queries.n());
    require(tau.size() == n,
            "tau has " + std::to_string(tau.size()) + " numbers, accepted is one for each of " + std::to_string(n) + " queries");
    for (size_t i = 0; i < tau.size(); ++i) {
        require(!std::isnan(tau[i]), "tau is NaN for query " + std::to_string(i) + ", accepted is a number or an infinity");
    }
    require(options.method == SearchMethod::sum || s.options.kind == IndexKind::ball,
            "method is sweep or filter, accepted for an index of kind grid is sum");
    const size_t wanted = options.method == SearchMethod::filter ? n * static_cast<size_t>(s.options.ball.n_subspaces) : 0;
    require(options.subspace_tau.size() == wanted, "subspace_tau has " + std::to_string(options.subspace_tau.size()) +
                                                       " numbers, accepted for this method is " + std::to_string(wanted));
    for (const double threshold : options.subspace_tau) {
        require(!std::isnan(threshold), "subspace_tau has a NaN, accepted is a number or an infinity");
    }
}

}  // namespace

Matches search_keys(const Index::State & state, const QuerySet & queries, std::span<const double> tau,
                    const SearchOptions & options) {
    validate(state, queries, tau, options);
    Search search(state, queries, tau, options);
    search.run();
    return search.gather();
}

std::vector<Scored> score_matches(const Index::State & state, const QuerySet & queries, std::span<const double> tau) {
    const SearchOptions options;
    Search search(state, queries, tau, options);
    search.run();
    return search.by_query();
}

}  // namespace louver
