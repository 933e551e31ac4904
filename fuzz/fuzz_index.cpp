// The input is a program over louver::Index; every answer is held against the judge.
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>

#include "judge.h"
#include "program.h"

using namespace louver;

namespace {

class Run {
  public:
    Run(const uint8_t * data, size_t size) : in_(data, size) {
        options_.kind = in_.byte() % 3 == 0 ? IndexKind::ball : IndexKind::grid;
        type_ = static_cast<DType>(in_.byte() % 3);
        model_.n_head_kv = 1 + in_.byte() % 3;
        constexpr int kDims[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 96, 128, 130};
        model_.dim = kDims[in_.byte() % 16];
        options_.ball.n_subspaces = 1 + in_.byte() % model_.dim;
        options_.ball.group_size = 1 + in_.byte() % 9;
        options_.ball.grouping = static_cast<Grouping>(in_.byte() % 2);
        options_.ball.enclosure = static_cast<Enclosure>(in_.byte() % 2);
        options_.ball.merge_at = 1 + in_.byte();
        options_.n_threads = 1 + in_.byte() % 2;
        model_.keys.resize(static_cast<size_t>(model_.n_head_kv));
        index_.emplace(options_, type_, model_.n_head_kv, model_.dim);
    }

    void steps() {
        in_.byte() % 4 == 0 ? borrow() : append();
        for (int i = 0; i < 16; ++i) {
            switch (in_.byte() % 10) {
                case 0: append(); break;
                case 1: update(); break;
                case 2: remove(); break;
                case 3: index_->rebuild(); break;
                case 4: reload(); break;
                case 5: select(); break;
                default: search(); break;
            }
        }
        search();
        select();
    }

  private:
    // Keys of all heads as they are stored; the rows may lie apart.
    struct Stored {
        std::vector<std::byte> bytes;
        StridedKeys view;
    };

    Stored make(int n) {
        const int flavour = in_.byte() % fuzz::kFlavours;
        const size_t element = row_bytes(type_, 1);
        const int gap = in_.byte() % 3;
        const size_t step = element * (gap == 2 ? 2 : 1);
        const size_t row = step * static_cast<size_t>(model_.dim) + (gap == 1 ? 3 : 0);
        Stored s;
        s.bytes.resize(static_cast<size_t>(model_.n_head_kv) * static_cast<size_t>(n) * row + 1);
        for (int h = 0; h < model_.n_head_kv; ++h) {
            const std::vector<float> x = fuzz::numbers(flavour, n, model_.dim, in_.byte(), false);
            for (size_t i = 0; i < x.size(); ++i) {
                const size_t dim = static_cast<size_t>(model_.dim);
                fuzz::store(type_, x[i],
                            s.bytes.data() + (static_cast<size_t>(h) * static_cast<size_t>(n) + i / dim) * row + i % dim * step);
            }
        }
        s.view = {s.bytes.data(),
                  type_,
                  model_.n_head_kv,
                  n,
                  model_.dim,
                  static_cast<int64_t>(static_cast<size_t>(n) * row),
                  static_cast<int64_t>(row),
                  static_cast<int64_t>(step)};
        return s;
    }

    // What row i of head h stands for.
    void decode(const Stored & s, int h, int i, float * to) const {
        for (int c = 0; c < model_.dim; ++c) {
            to[c] = fuzz::load(type_, s.view.base + h * s.view.head_stride + i * s.view.row_stride + c * s.view.element_stride);
        }
    }

    void append() {
        constexpr int kCounts[] = {0, 1, 2, 63, 64, 65, 127, 200, 256, 300, 513, 600};
        const int n = std::min(kCounts[in_.byte() % 12], 1500 - model_.n());
        const Stored s = make(std::max(n, 0));
        fuzz::expect(index_->append(s.view) == model_.n(), "append returned another position");
        add_to_model(s);
    }

    // The first keys, in memory that the index only copies when it changes.
    void borrow() {
        auto s = std::make_shared<const Stored>(make(1 + in_.below(300)));
        if (s->view.element_stride != static_cast<int64_t>(row_bytes(type_, 1))) {
            fuzz::expect(index_->append(s->view) == 0, "append returned another position");
        } else {
            index_.emplace(Index::borrow(options_, s->view, s));
            fuzz::expect(index_->is_borrowed(), "borrowed keys were copied");
        }
        add_to_model(*s);
    }

    void add_to_model(const Stored & s) {
        const int first = model_.n();
        for (int h = 0; h < model_.n_head_kv; ++h) {
            auto & keys = model_.keys[static_cast<size_t>(h)];
            keys.resize(static_cast<size_t>(first + s.view.n) * static_cast<size_t>(model_.dim));
            for (int i = 0; i < s.view.n; ++i) {
                decode(s, h, i, keys.data() + static_cast<size_t>(first + i) * static_cast<size_t>(model_.dim));
            }
        }
        model_.live.resize(static_cast<size_t>(first + s.view.n), true);
    }

    std::vector<int64_t> some_positions(bool live_only) {
        const int most = 1 + in_.byte() % 100;
        const int start = in_.below(65536);
        const int stride = 1 + in_.byte() % 7;
        std::vector<int64_t> positions;
        for (int i = 0; i < most && i * stride < model_.n(); ++i) {
            const int64_t position = (start + i * stride) % model_.n();
            if (!live_only || model_.live[static_cast<size_t>(position)]) {
                positions.push_back(position);
            }
        }
        std::sort(positions.begin(), positions.end());
        positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
        return positions;
    }

    void update() {
        const std::vector<int64_t> positions = some_positions(false);
        const Stored s = make(static_cast<int>(positions.size()));
        index_->update(positions, s.view);
        for (size_t i = 0; i < positions.size(); ++i) {
            for (int h = 0; h < model_.n_head_kv; ++h) {
                decode(s, h, static_cast<int>(i),
                       model_.keys[static_cast<size_t>(h)].data() +
                           static_cast<size_t>(positions[i]) * static_cast<size_t>(model_.dim));
            }
            model_.live[static_cast<size_t>(positions[i])] = true;
        }
    }

    void remove() {
        const std::vector<int64_t> positions = some_positions(true);
        index_->remove(positions);
        for (const int64_t position : positions) {
            model_.live[static_cast<size_t>(position)] = false;
        }
    }

    void reload() {
        const std::string path = "/dev/shm/louver-fuzz-" + std::to_string(getpid());
        index_->save(path);
        index_.emplace(Index::load(path, options_.n_threads));
        unlink(path.c_str());
    }

    std::vector<float> queries() {
        const int n = model_.n_head_kv * (1 + in_.byte() % 12);
        return fuzz::numbers(in_.byte() % fuzz::kFlavours, n, model_.dim, in_.byte(), true);
    }

    double threshold(const float * query, int head) {
        const int choice = in_.byte() % 8;
        if (choice == 6) {
            return in_.byte() % 2 ? HUGE_VAL : -HUGE_VAL;
        }
        if (choice == 7 || model_.n() == 0) {
            return std::ldexp(in_.byte() - 128.0, in_.byte() - 128);
        }
        const int i = in_.below(65536) % model_.n();
        const double at =
            model_.finite(head, i) ? static_cast<double>(fuzz::score(query, model_.key(head, i), model_.dim).value) : 0.0;
        return choice == 4 ? std::nextafter(at, HUGE_VAL) : choice == 5 ? std::nextafter(at, -HUGE_VAL) : at;
    }

    // Mostly none; else what a key scores in the subspace, or a number of that size. i: of [n_query][n_subspaces].
    double subspace_threshold(const std::vector<float> & queries, int i, int n_query) {
        const int choice = in_.byte() % 8;
        if (choice > 2 || model_.n() == 0) {
            return -HUGE_VAL;
        }
        const int n_subspaces = options_.ball.n_subspaces;
        const int query = i / n_subspaces;
        const int begin = i % n_subspaces * model_.dim / n_subspaces;
        const int width = (i % n_subspaces + 1) * model_.dim / n_subspaces - begin;
        const int head = query / (n_query / model_.n_head_kv);
        const int position = in_.below(65536) % model_.n();
        if (choice == 2 || !model_.finite(head, position)) {
            return std::ldexp(in_.byte() - 128.0, -4);
        }
        const float * q = queries.data() + static_cast<size_t>(query) * static_cast<size_t>(model_.dim) + begin;
        const double at = static_cast<double>(fuzz::score(q, model_.key(head, position) + begin, width).value);
        return choice == 1 ? std::nextafter(at, HUGE_VAL) : at;
    }

    void search() {
        const std::vector<float> q = queries();
        const size_t n = q.size() / static_cast<size_t>(model_.dim);
        std::vector<double> tau;
        for (size_t i = 0; i < n; ++i) {
            tau.push_back(threshold(q.data() + i * static_cast<size_t>(model_.dim),
                                    static_cast<int>(i) / (static_cast<int>(n) / model_.n_head_kv)));
        }
        SearchOptions options;
        std::vector<double> subspace_tau;
        if (options_.kind == IndexKind::ball) {
            options.method = static_cast<SearchMethod>(in_.byte() % 3);
        }
        if (options.method == SearchMethod::filter) {
            subspace_tau.resize(n * static_cast<size_t>(options_.ball.n_subspaces));
            for (size_t i = 0; i < subspace_tau.size(); ++i) {
                subspace_tau[i] = subspace_threshold(q, static_cast<int>(i), static_cast<int>(n));
            }
            options.subspace_tau = subspace_tau;
        }
        fuzz::judge_search(model_, q, tau, index_->search(q, tau, options), subspace_tau);
    }

    void select() {
        if (std::count(model_.live.begin(), model_.live.end(), true) == 0) {
            return;
        }
        const std::vector<float> q = queries();
        Oracle oracle;
        oracle.kind = in_.byte() % 2 ? OracleKind::mass : static_cast<OracleKind>(in_.byte() % 8);
        constexpr double kEpsilon[] = {0, 1e-9, 0.001, 0.05, 0.3, 0.9, 0.9999};
        oracle.epsilon = kEpsilon[in_.byte() % 7];
        oracle.tau = std::ldexp(in_.byte() - 128.0, in_.byte() % 32 - 16);
        oracle.fraction = (1 + in_.byte()) / 256.0;
        oracle.k = 1 + in_.byte();
        oracle.n_samples = 1 + in_.byte();
        oracle.seed = in_.byte() % 4;
        constexpr double kScale[] = {0.125, 1.0, 1e-3, 30.0};
        const double scale = kScale[in_.byte() % 4];
        fuzz::judge_selection(model_, q, index_->select(q, oracle, scale), scale, oracle);
        attend(q, oracle, scale);
    }

    void attend(const std::vector<float> & q, const Oracle & oracle, double scale) {
        const int dim = 1 + in_.byte() % 5;
        const int n = model_.n();
        const std::vector<float> values = fuzz::numbers(in_.byte() % 2 ? 0 : 10, model_.n_head_kv * n, dim, in_.byte(), true);
        const StridedKeys view{reinterpret_cast<const std::byte *>(values.data()),
                               DType::f32,
                               model_.n_head_kv,
                               n,
                               dim,
                               int64_t{4} * n * dim,
                               int64_t{4} * dim,
                               4};
        const bool compensate = in_.byte() % 2 != 0;
        fuzz::judge_attention(model_, q, values, dim, index_->attend(q, view, oracle, scale, compensate), scale);
    }

    fuzz::Choices in_;
    IndexOptions options_;
    DType type_;
    fuzz::Model model_;
    std::optional<Index> index_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    Run(data, size).steps();
    return 0;
}
