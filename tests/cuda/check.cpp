// Every CUDA kernel against float64 on the host: louver_cuda_check [--quick]. Exit status 0 if all holds.
// --quick is for compute-sanitizer, under which everything takes much longer.
#include <cstring>

#include "cuda/device_index.h"
#include "louver/grid_index.h"
#include "report.h"
#include "scene.h"

namespace louver::checks {
namespace {

using cuda::AttentionOp;
using cuda::CacheIndex;
using cuda::Workspace;

void sync() { cuda::check(cudaDeviceSynchronize(), "a kernel"); }

CacheIndex index_of(const Scene & scene) {
    const Shape & s = scene.shape;
    return {0, scene.key_plane(), scene.value_plane(), s.n_stream, s.n_head_kv, s.kv_size, s.n_gqa};
}

void run(Workspace & space, const CacheIndex & index, const AttentionOp & op, void * stream = nullptr) {
    space.reserve(index, op.n_head, op.n_token * op.n_stream);
    space.poison();
    space.see(index, op, stream);
    space.attend(index, op, stream);
}

template <class T> std::vector<T> fetch(const T * from, size_t n) {
    std::vector<T> host(n);
    cuda::check(cudaMemcpy(host.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
}

// What decides how far float32 is from float64: a part of the longest value.
double tolerance(const Scene & scene, int row, int head) {
    const Shape & s = scene.shape;
    double key_norm = 0;
    double value_norm = 0;
    double query_norm = 0;
    for (int cell = 0; cell < s.n_kv; ++cell) {
        double key = 0;
        double value = 0;
        for (int c = 0; c < s.key_dim; ++c) {
            const double x = load_element(s.type, scene.host_key(scene.cell_row(row, cell), head / s.n_gqa), c);
            key += x * x;
        }
        for (int c = 0; c < s.value_dim; ++c) {
            const double x = load_element(s.type, scene.host_value(scene.cell_row(row, cell), head / s.n_gqa), c);
            value += x * x;
        }
        key_norm = std::max(key_norm, key);
        value_norm = std::max(value_norm, value);
    }
    for (int c = 0; c < s.key_dim; ++c) {
        const double x = static_cast<double>(
            scene.host_query[static_cast<size_t>(row) * scene.query_stride() + static_cast<size_t>(head * s.key_dim + c)]);
        query_norm += x * x;
    }
    const double score = 4 * std::sqrt(query_norm * key_norm) * static_cast<double>(scene.scale) * 0x1p-23;
    return std::sqrt(value_norm) * (score + 1e-5);
}

double distance(const float * output, const std::vector<double> & wanted) {
    double sum = 0;
    for (size_t c = 0; c < wanted.size(); ++c) {
        const double d = static_cast<double>(output[c]) - wanted[c];
        sum += d * d;
    }
    return std::sqrt(sum);  // a NaN is not below anything
}

struct Tally {
    double visible = 0;
    double attended = 0;
    double worst = 0;  // distance beside its bound
};

// The outputs and certificates of one op against dense attention.
Tally compare(Report & report, const Scene & scene, const CacheIndex & index, const Workspace & space, const AttentionOp & op,
              const std::string & name) {
    const Shape & s = scene.shape;
    sync();
    const std::vector<float> output = scene.output.get<float>();
    const std::vector<HeadCertificate> certificates = index.certificates(static_cast<int64_t>(scene.n_rows()) * scene.n_head);
    const std::vector<uint64_t> kept = space.kept(index, op);
    const int n_part = (s.n_gqa + 7) / 8;
    const int n_shared = (s.n_gqa + n_part - 1) / n_part;
    const int n_blocks = n_blocks_for(s.n_kv);
    Tally tally;
    for (int row = 0; row < scene.n_rows(); ++row) {
        for (int head = 0; head < scene.n_head; ++head) {
            const std::string where = name + ", row " + std::to_string(row) + " head " + std::to_string(head);
            const Dense dense = scene.dense(row, head);
            const HeadCertificate & c = certificates[static_cast<size_t>(row * scene.n_head + head)];
            const int group = (row * s.n_head_kv + head / s.n_gqa) * n_part + head % s.n_gqa / n_shared;
            int n_visible = 0;
            int n_kept = 0;
            double dropped = 0;
            double highest = -INFINITY;
            for (int cell = 0; cell < s.n_kv; ++cell) {
                const bool is_kept = (kept[static_cast<size_t>(group * n_blocks + cell / 64)] >> (cell % 64) & 1) != 0;
                if (!scene.sees(row, cell)) {
                    report.expect(!is_kept, where + ": an invisible cell was attended");
                    continue;
                }
                ++n_visible;
                n_kept += is_kept ? 1 : 0;
                if (!is_kept) {
                    dropped += dense.weight[static_cast<size_t>(cell)];
                    highest = std::max(highest, dense.score[static_cast<size_t>(cell)]);
                }
            }
            report.expect(c.n_visible == n_visible, where + ": n_visible " + std::to_string(c.n_visible));
            report.expect(c.n_attended == n_kept, where + ": n_attended " + std::to_string(c.n_attended));
            report.expect(c.n_scanned <= n_visible, where + ": n_scanned " + std::to_string(c.n_scanned));
            report.expect(highest < static_cast<double>(c.tau) || n_kept == n_visible,
                          where + ": a key of " + std::to_string(highest) + " was missed, tau " + std::to_string(c.tau));
            report.expect(dropped <= static_cast<double>(c.delta),
                          where + ": dropped " + std::to_string(dropped) + " above delta " + std::to_string(c.delta));
            report.expect(static_cast<double>(c.delta) <= op.settings.epsilon + 1e-12,
                          where + ": delta " + std::to_string(c.delta) + " above epsilon");
            const float * out =
                &output[static_cast<size_t>(row) * scene.output_stride() + static_cast<size_t>(head * s.value_dim)];
            const double bound = static_cast<double>(c.error_bound) + tolerance(scene, row, head);
            const double off = distance(out, dense.output);
            report.expect(off <= bound, where + ": off by " + std::to_string(off) + ", bound " + std::to_string(bound) +
                                            ", delta " + std::to_string(c.delta));
            tally.visible += n_visible;
            tally.attended += n_kept;
            tally.worst = std::max(tally.worst, off / bound);
        }
    }
    report.expect(scene.intact(), name + ": a sentinel was overwritten");
    // What lies between the rows of the output is not ours.
    for (int row = 0; row < scene.n_rows(); ++row) {
        for (size_t c = static_cast<size_t>(scene.n_head * s.value_dim); c < scene.output_stride(); ++c) {
            report.expect(std::isnan(output[static_cast<size_t>(row) * scene.output_stride() + c]),
                          name + ": written between output rows");
        }
    }
    return tally;
}

void check_planes(Report & report, const Shape & shape) {
    Scene scene(shape, 1);
    CacheIndex index = index_of(scene);
    const int64_t n_cells = shape.kv_size / 64 * 64;
    for (int stream = 0; stream < shape.n_stream; ++stream) {
        index.build(stream, n_cells, nullptr);
    }
    sync();
    const cuda::Planes & p = index.planes();
    const auto slots = static_cast<size_t>(p.slot(shape.n_stream, 0, 0));
    const auto codes = fetch(p.codes, slots * static_cast<size_t>(p.codes_per_block()));
    const auto grid = fetch(p.grid, slots * static_cast<size_t>(2 * p.width()));
    const auto means = fetch(p.means, slots * static_cast<size_t>(p.value_dim));
    const auto bounds = fetch(p.bounds, slots);
    const auto indexed = fetch(p.indexed, slots);
    const auto close = [](float a, float b) { return std::fabs(a - b) <= 1e-6f * std::fabs(b); };
    for (int stream = 0; stream < shape.n_stream; ++stream) {
        for (int head = 0; head < shape.n_head_kv; ++head) {
            GridIndex wanted(shape.key_dim, shape.value_dim, shape.kv_size);
            const Rows keys{scene.host_key(stream * shape.kv_size, head), static_cast<int64_t>(scene.key_row()), shape.key_dim,
                            shape.type};
            const Rows values{scene.host_value(stream * shape.kv_size, head), static_cast<int64_t>(scene.value_row()),
                              shape.value_dim, shape.type};
            for (int block = 0; block < n_cells / 64; ++block) {
                wanted.repair(block, ~uint64_t{0}, keys, values);
                const auto slot = static_cast<size_t>(p.slot(stream, head, block));
                const std::string where = shape.name() + ", head " + std::to_string(head) + " block " + std::to_string(block);
                report.expect(indexed[slot] == wanted.indexed(block), where + ": indexed");
                for (int c = 0; c < shape.key_dim; ++c) {
                    const auto at =
                        slot * 2 * static_cast<size_t>(p.width()) + static_cast<size_t>(cuda::grid_position(c, p.n_tiles));
                    report.expect(grid[at] == wanted.center(block)[c], where + ": centre of channel " + std::to_string(c));
                    report.expect(grid[at + static_cast<size_t>(p.width())] == wanted.step(block)[c],
                                  where + ": step of channel " + std::to_string(c));
                    for (int cell = 0; cell < 64; ++cell) {
                        const int code = codes[slot * static_cast<size_t>(p.codes_per_block()) +
                                               static_cast<size_t>(cuda::code_position(cell, c, p.n_tiles))];
                        const int other = wanted.codes(block)[(c / 4 * 64 + cell) * 4 + c % 4] - 128;
                        report.expect(code == other, where + ": code of cell " + std::to_string(cell) + " channel " +
                                                         std::to_string(c) + " is " + std::to_string(code) + ", not " +
                                                         std::to_string(other));
                    }
                }
                const auto * mean = reinterpret_cast<const uint16_t *>(wanted.value_means().row(block));
                for (int c = 0; c < shape.value_dim; ++c) {
                    // The CPU adds in another order: the last bit may differ.
                    const int bits = means[slot * static_cast<size_t>(p.value_dim) + static_cast<size_t>(c)];
                    report.expect(std::abs(bits - mean[c]) <= 1 || (mean[c] & 0x7fff) < 0x3a00, where + ": mean value");
                }
                const BlockBounds & b = bounds[slot];
                const BlockBounds & o = *wanted.bounds(block);
                report.expect(close(b.residual_norm, o.residual_norm) && close(b.code_norm, o.code_norm) &&
                                  close(b.center_norm, o.center_norm) && close(b.key_norm, o.key_norm) &&
                                  std::fabs(b.value_norm - o.value_norm) <= 1e-2f * o.value_norm,
                              where + ": bounds");
            }
        }
    }
    report.expect(scene.intact(), shape.name() + ": a sentinel was overwritten");
}

void check_attention(Report & report, const Shape & shape, uint64_t seed, bool prints) {
    Scene scene(shape, seed);
    CacheIndex index = index_of(scene);
    for (int stream = 0; stream < shape.n_stream; ++stream) {
        index.build(stream, shape.n_kv / 64 * 64, nullptr);
    }
    Workspace space(0);
    for (const bool hides : {false, true}) {
        hides ? scene.see_some() : scene.see_all();
        scene.renew_queries();
        scene.upload();
        for (const double epsilon : {0.05, 0.3, 0.001, 0.0}) {
            DecodeSettings settings;
            settings.epsilon = epsilon;
            settings.check = epsilon != 0.001;  // with it every head is scanned; without, not those that attend to nearly all
            const AttentionOp op = scene.op(settings);
            scene.output.poison();
            run(space, index, op);
            const std::string name = shape.name() + ", epsilon " + std::to_string(epsilon) + (hides ? ", mask" : "");
            const Tally tally = compare(report, scene, index, space, op, name);
            if (prints && !hides) {
                std::printf("  %-78s attends %5.1f %%, error %.2f of its bound\n", name.c_str(),
                            100 * tally.attended / tally.visible, tally.worst);
            }
            report.expect(epsilon > 0 || tally.attended == tally.visible, name + ": epsilon 0 left something out");
            // Where the keys are as a model's are, or the check would show nothing.
            report.expect(epsilon < 0.05 || hides || shape.keys != Keys::clustered || tally.attended < 0.7 * tally.visible,
                          name + ": nothing was pruned: " + std::to_string(tally.attended / tally.visible));
            const std::vector<std::byte> once = scene.output.get<std::byte>();
            scene.output.poison();
            run(space, index, op);
            compare(report, scene, index, space, op, name + ", again");
            report.expect(!settings.check || once == scene.output.get<std::byte>(), name + ": a second run gave other bits");
        }
    }
    // Where thread blocks have least shared memory of all that is served.
    space.limit_shared(99 * 1024);
    for (const double epsilon : {0.0, 0.05}) {
        DecodeSettings settings;
        settings.epsilon = epsilon;
        const AttentionOp op = scene.op(settings);
        report.expect(space.fits(index, op), shape.name() + ": wants more than 99 KB of shared memory");
        scene.output.poison();
        run(space, index, op);
        compare(report, scene, index, space, op, shape.name() + ", 99 KB, epsilon " + std::to_string(epsilon));
    }
    {
        // What a share keeps between scan and attention in global memory: the same work, and so the same bits.
        DecodeSettings settings;
        settings.check = true;
        const AttentionOp op = scene.op(settings);
        scene.output.poison();
        run(space, index, op);
        const std::vector<std::byte> near = scene.output.get<std::byte>();
        space.limit_shared(space.least_shared(index, op));
        scene.output.poison();
        run(space, index, op);
        compare(report, scene, index, space, op, shape.name() + ", nothing kept in shared memory");
        report.expect(near == scene.output.get<std::byte>(), shape.name() + ": global memory gave other bits than shared memory");
    }
    space.limit_shared(1024);
    report.expect(!space.fits(index, scene.op({})), shape.name() + ": fits into 1 KB of shared memory");
    const cuda::Totals totals = index.totals();
    report.expect(totals.pairs > 0, shape.name() + ": the check compared nothing");
    report.expect(totals.misses == 0 && totals.bound_violations == 0 && totals.mass_violations == 0,
                  shape.name() + ": the check found " + std::to_string(totals.misses) + " misses, " +
                      std::to_string(totals.bound_violations) + " bounds, " + std::to_string(totals.mass_violations) + " masses");
}

// Cells are rewritten. With `tells`, the index is told; without, it must come to light.
void check_rewritten(Report & report, const Shape & shape, bool tells) {
    Scene scene(shape, 3);
    CacheIndex index = index_of(scene);
    for (int stream = 0; stream < shape.n_stream; ++stream) {
        index.build(stream, shape.n_kv / 64 * 64, nullptr);
    }
    Workspace space(0);
    DecodeSettings settings;
    settings.check = true;
    settings.recent = 0;
    const AttentionOp op = scene.op(settings);
    run(space, index, op);
    sync();
    index.reset_totals();
    std::vector<int64_t> rows;
    for (int i = 0; i < 40; ++i) {
        // Neither the first nor the last of a stream, which are always attended.
        const int64_t cell = 64 + static_cast<int64_t>(scene.uniform() * static_cast<double>(shape.n_kv - 128));
        rows.push_back(i % shape.n_stream * shape.kv_size + cell);
    }
    // What the queries look for most of all.
    std::vector<float> key(static_cast<size_t>(shape.key_dim));
    for (const int64_t row : rows) {
        for (int head = 0; head < shape.n_head_kv; ++head) {
            for (int c = 0; c < shape.key_dim; ++c) {
                key[static_cast<size_t>(c)] = 3 * scene.directions[static_cast<size_t>(head * shape.key_dim + c)];
            }
            store_row(shape.type, key.data(), shape.key_dim, const_cast<std::byte *>(scene.host_key(row, head)));
        }
    }
    scene.upload();
    const Guarded on_device(rows);
    if (tells) {
        cuda::write_rows({{&index, 0}}, on_device.data(), true, static_cast<int>(rows.size()), nullptr);
    }
    scene.output.poison();
    run(space, index, op);
    sync();
    const cuda::Totals totals = index.totals();
    const std::string name = shape.name() + (tells ? ", rewritten" : ", rewritten and not told");
    if (!tells) {
        report.expect(totals.misses + totals.bound_violations > 0 && totals.mass_violations > 0,
                      name + ": the check found nothing");
        return;
    }
    compare(report, scene, index, space, op, name);
    report.expect(totals.misses == 0 && totals.bound_violations == 0 && totals.mass_violations == 0, name + ": the check");
    report.expect(on_device.intact(), name + ": a sentinel was overwritten");
    // The step encoded them on its way.
    scene.output.poison();
    run(space, index, op);
    compare(report, scene, index, space, op, name + ", encoded again");
    const int64_t complete = static_cast<int64_t>(shape.n_kv / 64) * 64 * shape.n_stream * shape.n_head_kv;
    report.expect(index.indexed_cells() == complete,
                  name + ": " + std::to_string(index.indexed_cells()) + " cells are indexed, not " + std::to_string(complete));
}

// Token after token, as a generation goes: one captured graph, replayed with another query, mask and row.
void check_generation(Report & report, const Shape & shape, int n_steps) {
    Scene scene(shape, 4);
    CacheIndex index = index_of(scene);
    const int before = shape.n_kv - n_steps;
    const auto sees_until = [&](int end) {
        for (int cell = 0; cell < shape.n_kv; ++cell) {
            scene.host_mask[static_cast<size_t>(cell)] = cell < end ? 0 : 0xfc00;
        }
    };
    index.build(0, before / 64 * 64, nullptr);
    sees_until(before);
    scene.upload();
    Workspace space(0);
    DecodeSettings settings;
    settings.check = true;
    const AttentionOp op = scene.op(settings);
    Guarded row(std::vector<int32_t>{0});
    cudaStream_t stream = nullptr;
    cuda::check(cudaStreamCreate(&stream), "cudaStreamCreate");
    space.reserve(index, op.n_head, 1);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    cuda::write_rows({{&index, 0}}, row.data(), false, 1, stream);
    space.see(index, op, stream);
    space.attend(index, op, stream);
    cuda::check(cudaStreamEndCapture(stream, &graph), "capture");
    cuda::check(cudaGraphInstantiate(&executable, graph, 0), "capture");
    const std::string name = shape.name() + ", generation";
    for (int step = 0; step < n_steps; ++step) {
        const int cell = before + step;
        scene.renew_cells(cell, 1);
        scene.renew_queries();
        sees_until(cell + 1);
        scene.upload();
        row.set(std::vector<int32_t>{cell});
        scene.output.poison();
        cuda::check(cudaGraphLaunch(executable, stream), "replay");
        sync();
        if (step % 16 == 0) {
            compare(report, scene, index, space, op, name + ", step " + std::to_string(step));
        }
    }
    const cuda::Totals totals = index.totals();
    report.expect(totals.tokens[1] == static_cast<unsigned long long>(n_steps), name + ": tokens counted");
    report.expect(totals.queries == static_cast<unsigned long long>(n_steps * scene.n_head), name + ": queries counted");
    report.expect(totals.misses == 0 && totals.bound_violations == 0 && totals.mass_violations == 0, name + ": the check");
    const int64_t complete = static_cast<int64_t>(shape.n_kv / 64) * 64 * shape.n_head_kv;
    report.expect(index.indexed_cells() >= complete - 64 * shape.n_head_kv,
                  name + ": " + std::to_string(index.indexed_cells()) + " of " + std::to_string(complete) + " cells are indexed");
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
}

// The op's output.
std::vector<float> attended(Scene & scene, Workspace & space, const CacheIndex & index, const AttentionOp & op) {
    scene.output.poison();
    run(space, index, op);
    sync();
    return scene.output.get<float>();
}

// A number that is not finite: what dense attention makes of it, and no claim.
void check_not_finite(Report & report, const Shape & shape, float bad, bool in_key) {
    Scene scene(shape, 5);
    CacheIndex index = index_of(scene);
    const std::string name = shape.name() + ", " + std::to_string(bad) + (in_key ? " in a key" : " in a value");
    const int cell = shape.n_kv / 2;
    std::vector<float> row(static_cast<size_t>(std::max(shape.key_dim, shape.value_dim)), 0.5f);
    row[3] = bad;
    if (in_key) {
        store_row(shape.type, row.data(), shape.key_dim, const_cast<std::byte *>(scene.host_key(cell, 0)));
    } else {
        store_row(shape.type, row.data(), shape.value_dim, const_cast<std::byte *>(scene.host_value(cell, 0)));
    }
    scene.upload();
    index.build(0, shape.n_kv / 64 * 64, nullptr);
    Workspace space(0);
    const AttentionOp op = scene.op(DecodeSettings{});
    const std::vector<float> output = attended(scene, space, index, op);
    const std::vector<HeadCertificate> certificates = index.certificates(scene.n_head);
    for (int head = 0; head < scene.n_head; ++head) {
        const Dense dense = scene.dense(0, head);
        const bool affected = head / shape.n_gqa == 0;
        const std::string where = name + ", head " + std::to_string(head);
        for (int c = 0; c < shape.value_dim; ++c) {
            const float found = output[static_cast<size_t>(head * shape.value_dim + c)];
            const double wanted = dense.output[static_cast<size_t>(c)];
            report.expect(std::isfinite(found) == std::isfinite(wanted),
                          where + ": " + std::to_string(found) + ", dense " + std::to_string(wanted));
        }
        const HeadCertificate & c = certificates[static_cast<size_t>(head)];
        report.expect(!affected || !in_key || c.n_attended == c.n_visible, where + ": not attended in full");
    }
    const cuda::Totals totals = index.totals();
    report.expect(!in_key || totals.not_finite == static_cast<unsigned long long>(shape.n_gqa),
                  name + ": counted " + std::to_string(totals.not_finite));
    // Nothing of it is left once the cell is written anew.
    scene.renew_cells(cell, 1);
    scene.upload();
    const Guarded rows(std::vector<int64_t>{cell});
    cuda::write_rows({{&index, 0}}, rows.data(), true, 1, nullptr);
    scene.output.poison();
    space.see(index, op, nullptr);
    space.attend(index, op, nullptr);
    compare(report, scene, index, space, op, name + ", mended");
}

// A number in a query that is none, with the bits that a GPU gives it.
void check_query_not_finite(Report & report, const Shape & shape) {
    Scene scene(shape, 6);
    const CacheIndex index = index_of(scene);
    scene.host_query[3] = std::bit_cast<float>(0x7fffffffu);
    scene.upload();
    Workspace space(0);
    const AttentionOp op = scene.op(DecodeSettings{});
    const std::vector<float> output = attended(scene, space, index, op);
    for (int head = 0; head < scene.n_head; ++head) {
        for (int c = 0; c < shape.value_dim; ++c) {
            const float found = output[static_cast<size_t>(head * shape.value_dim + c)];
            report.expect(std::isfinite(found) == (head > 0),
                          shape.name() + ", NaN in a query, head " + std::to_string(head) + ": " + std::to_string(found));
        }
    }
}

// The workspace has room for what the kernels write where there is most of it.
void check_room(Report & report) {
    constexpr int kCells = 1 << 20;
    constexpr int kRows = 4;
    const cuda::Plane plane{reinterpret_cast<const std::byte *>(uintptr_t{256}), 128, 128, 64, DType::f16};  // is not read
    const CacheIndex index(0, plane, plane, 1, 1, kCells, 8);
    AttentionOp op;
    op.n_token = kRows;
    op.n_head = 8;
    op.n_kv = kCells;
    Workspace space(0);
    space.reserve(index, op.n_head, kRows);
    report.expect(space.fits(index, op), "1,048,576 cells and 4 rows of 8 heads do not fit");
}

// A mask of other values than 0 and -infinity is added to the scores, by dense attention.
void check_bias(Report & report, const Shape & shape) {
    Scene scene(shape, 6);
    CacheIndex index = index_of(scene);
    index.build(0, shape.n_kv / 64 * 64, nullptr);
    scene.host_mask[7] = 0x4200;  // 3
    scene.upload();
    Workspace space(0);
    const AttentionOp op = scene.op(DecodeSettings{});
    const std::vector<float> output = attended(scene, space, index, op);
    for (int head = 0; head < scene.n_head; ++head) {
        Dense dense = scene.dense(0, head);
        // Cell 7 e^3 times as heavy.
        const double more = dense.weight[7] * (std::exp(3.0) - 1);
        for (int c = 0; c < shape.value_dim; ++c) {
            dense.output[static_cast<size_t>(c)] = (dense.output[static_cast<size_t>(c)] +
                                                    more * load_element(shape.type, scene.host_value(7, head / shape.n_gqa), c)) /
                                                   (1 + more);
        }
        const double off = distance(&output[static_cast<size_t>(head * shape.value_dim)], dense.output);
        report.expect(off <= tolerance(scene, 0, head), shape.name() + ", mask values: off by " + std::to_string(off));
    }
    report.expect(index.totals().not_plain == static_cast<unsigned long long>(scene.n_head), shape.name() + ": not_plain");
}

StridedKeys strided(const Scene & scene, const cuda::Plane & plane) {
    const int64_t element = plane.type == DType::f32 ? 4 : 2;
    return {plane.data, plane.type,        scene.shape.n_head_kv, scene.shape.kv_size,
            plane.dim,  plane.head_stride, plane.row_stride,      element};
}

// The library over keys on a device: every key with q.k >= tau and no other. The keys are whole numbers, and so are half of the
// thresholds scores: sums are exact, and ties are many.
void check_search(Report & report, const Shape & shape, uint64_t seed) {
    Scene scene(shape, seed);
    std::vector<float> row(static_cast<size_t>(shape.key_dim));
    for (int64_t r = 0; r < scene.rows(); ++r) {
        for (int head = 0; head < shape.n_head_kv; ++head) {
            for (float & x : row) {
                x = std::nearbyint(3 * scene.normal());
            }
            if (r == 77 && shape.kv_size > 100) {
                row[5] = INFINITY;  // found by every query
            }
            store_row(shape.type, row.data(), shape.key_dim, const_cast<std::byte *>(scene.host_key(r, head)));
        }
    }
    scene.upload();
    cuda::DeviceIndex index(0, strided(scene, scene.key_plane()), nullptr);
    const auto n_query = static_cast<size_t>(scene.n_head);
    std::vector<float> queries;
    for (size_t i = 0; i < n_query * static_cast<size_t>(shape.key_dim); ++i) {
        queries.push_back(std::nearbyint(2 * scene.normal()));
    }
    const auto score_of = [&](size_t query, int64_t r) {
        double sum = 0;
        for (int c = 0; c < shape.key_dim; ++c) {
            sum += static_cast<double>(queries[query * static_cast<size_t>(shape.key_dim) + static_cast<size_t>(c)]) *
                   load_element(shape.type, scene.host_key(r, static_cast<int>(query) / shape.n_gqa), c);
        }
        return sum;
    };
    std::vector<double> tau(n_query);
    for (const int kind : {0, 1, 2, 3}) {
        for (size_t query = 0; query < n_query; ++query) {
            const auto some = static_cast<int64_t>(scene.uniform() * static_cast<double>(shape.kv_size));
            const double found = score_of(query, some == 77 ? 0 : some);
            tau[query] = kind == 0        ? found
                         : kind == 1      ? std::nextafter(found, INFINITY)
                         : kind == 2      ? 60 + 10 * scene.uniform()
                         : query % 2 == 0 ? -INFINITY
                                          : INFINITY;
        }
        const std::string name = shape.name() + ", search of kind " + std::to_string(kind);
        index.poison();
        const cuda::DeviceMatches matches = index.search(queries, tau);
        const auto ids = fetch(matches.ids.as<int64_t>(), static_cast<size_t>(matches.offsets.back()));
        const auto scores = fetch(matches.scores.as<double>(), ids.size());
        for (size_t query = 0; query < n_query; ++query) {
            auto at = static_cast<size_t>(matches.offsets[query]);
            for (int64_t r = 0; r < shape.kv_size; ++r) {
                const double score = score_of(query, r);
                const bool found = at < static_cast<size_t>(matches.offsets[query + 1]) && ids[at] == r;
                const bool wanted = score >= tau[query] || !std::isfinite(score);
                report.expect(found == wanted, name + ", query " + std::to_string(query) + ": key " + std::to_string(r) + " of " +
                                                   std::to_string(score) + (found ? " was found" : " was missed") + ", tau " +
                                                   std::to_string(tau[query]));
                if (found) {
                    report.expect(scores[at] == score || !std::isfinite(score), name + ": a score");
                    ++at;
                }
            }
            report.expect(at == static_cast<size_t>(matches.offsets[query + 1]), name + ": something else was found");
        }
        report.expect(
            kind != 2 || shape.kv_size < 500 || matches.stats.n_scored < static_cast<int64_t>(n_query) * shape.kv_size / 2,
            name + ": nothing was excluded: " + std::to_string(matches.stats.n_scored));
    }
    report.expect(scene.intact(), shape.name() + ": a sentinel was overwritten");
}

// Attention of the library, beside dense attention.
void check_library_attention(Report & report, const Shape & shape, uint64_t seed) {
    Scene scene(shape, seed);
    cuda::DeviceIndex index(0, strided(scene, scene.key_plane()), nullptr);
    const std::vector<float> queries(scene.host_query.begin(), scene.host_query.begin() + scene.n_head * shape.key_dim);
    for (const double epsilon : {0.05, 0.0}) {
        for (const bool compensates : {true, false}) {
            index.poison();
            const cuda::DeviceAttention found = index.attend(queries, strided(scene, scene.value_plane()), epsilon,
                                                             static_cast<double>(scene.scale), compensates);
            const auto output = fetch(found.output.as<float>(), static_cast<size_t>(scene.n_head * shape.value_dim));
            double attended = 0;
            for (int head = 0; head < scene.n_head; ++head) {
                const std::string where = shape.name() + ", library, head " + std::to_string(head);
                const HeadCertificate & c = found.certificates[static_cast<size_t>(head)];
                const double off = distance(&output[static_cast<size_t>(head * shape.value_dim)], scene.dense(0, head).output);
                const double bound = static_cast<double>(c.error_bound) + tolerance(scene, 0, head);
                report.expect(off <= bound, where + ": off by " + std::to_string(off) + ", bound " + std::to_string(bound));
                report.expect(static_cast<double>(c.delta) <= epsilon, where + ": delta");
                report.expect(epsilon > 0 || c.n_attended == shape.kv_size, where + ": epsilon 0 left something out");
                attended += static_cast<double>(c.n_attended) / static_cast<double>(shape.kv_size) / scene.n_head;
            }
            report.expect(epsilon == 0 || attended < 0.7, shape.name() + ", library: nothing was pruned");
        }
    }
    report.expect(scene.intact(), shape.name() + ": a sentinel was overwritten");
}

// That the comparisons above can fail.
void check_controls(Report & report, const Shape & shape) {
    Scene scene(shape, 7);
    report.expect(scene.intact(), "sentinels of a fresh scene");
    CacheIndex index = index_of(scene);
    index.build(0, shape.n_kv / 64 * 64, nullptr);
    Workspace space(0);
    const AttentionOp op = scene.op(DecodeSettings{});
    const std::vector<float> output = attended(scene, space, index, op);
    Dense dense = scene.dense(0, 0);
    const size_t heaviest =
        static_cast<size_t>(std::max_element(dense.weight.begin(), dense.weight.end()) - dense.weight.begin());
    for (int c = 0; c < shape.value_dim; ++c) {
        dense.output[static_cast<size_t>(c)] -=
            dense.weight[heaviest] * load_element(shape.type, scene.host_value(static_cast<int64_t>(heaviest), 0), c);
    }
    report.expect(distance(output.data(), dense.output) > tolerance(scene, 0, 0), "control: without its heaviest key");
    cuda::check(cudaMemset(scene.output.data() - 1, 0, 1), "cudaMemset");
    report.expect(!scene.intact(), "control: one byte before a buffer");
}

int run_all(bool quick) {
    Report report;
    report.section("planes, beside the CPU's index");
    for (const DType type : {DType::f16, DType::bf16, DType::q8_0, DType::f32}) {
        for (const int dim : {64, 80, 96, 128, 256}) {
            if ((type != DType::q8_0 || dim % 32 == 0) && (!quick || dim == 128 || dim == 80)) {
                Shape shape{dim, dim, type, 2, 1, 2, quick ? 128 : 320, 320, 1, Keys::clustered};
                check_planes(report, shape);
                shape.keys = Keys::constant;
                check_planes(report, shape);
            }
        }
    }
    report.section("attention and its certificates, beside dense attention in float64");
    uint64_t seed = 10;
    for (const DType type : {DType::f16, DType::bf16, DType::q8_0, DType::f32}) {
        for (const int dim : {64, 80, 96, 128, 256}) {
            for (const int n_gqa : {1, 2, 3, 4, 6, 8, 12}) {
                const bool wanted = (type != DType::q8_0 || dim % 32 == 0) &&
                                    (quick ? (dim == 128 && n_gqa == 3) || (dim == 80 && n_gqa == 6 && type == DType::f16)
                                           : type == DType::f16 || n_gqa == 3 || n_gqa == 12);
                if (wanted) {
                    const int n_kv = quick ? 700 : 1900;
                    check_attention(report, {dim, dim, type, 2, n_gqa, 1, n_kv + 148, n_kv, 1, Keys::clustered}, seed++,
                                    n_gqa == 3);
                }
            }
        }
    }
    const int n_kv = quick ? 500 : 3000;
    for (const Keys keys : {Keys::gaussian, Keys::constant, Keys::large}) {
        check_attention(report, {128, 128, DType::f16, 2, 3, 1, n_kv, n_kv, 1, keys}, seed++, true);
    }
    check_attention(report, {128, 64, DType::f16, 2, 3, 1, n_kv, n_kv, 1, Keys::clustered}, seed++, true);
    check_attention(report, {64, 128, DType::f16, 2, 3, 1, n_kv, n_kv, 1, Keys::clustered}, seed++, true);
    check_attention(report, {128, 128, DType::f16, 2, 3, 3, n_kv + 72, n_kv, 1, Keys::clustered}, seed++, true);
    check_attention(report, {128, 128, DType::f16, 2, 4, 2, n_kv + 8, n_kv, 4, Keys::clustered}, seed++, true);
    check_attention(report, {128, 128, DType::f16, 8, 3, 1, n_kv, n_kv, 1, Keys::clustered}, seed++, true);
    for (const int few : {1, 5, 63, 64, 65, 200}) {
        check_attention(report, {128, 128, DType::f16, 2, 3, 1, 256, few, 1, Keys::gaussian}, seed++, false);
    }
    if (!quick) {
        check_attention(report, {128, 128, DType::f16, 1, 3, 1, 40000, 39999, 1, Keys::clustered}, seed++, true);
    }
    report.section("rewritten cells");
    for (const bool tells : {true, false}) {
        check_rewritten(report, {128, 128, DType::f16, 2, 3, 1, 1024, 1024, 1, Keys::clustered}, tells);
        check_rewritten(report, {64, 64, DType::q8_0, 2, 3, 2, 1024, 1024, 1, Keys::clustered}, tells);
    }
    report.section("generation with a captured graph");
    check_generation(report, {128, 128, DType::f16, 2, 3, 1, 2048, 1200, 1, Keys::clustered}, quick ? 20 : 200);
    check_generation(report, {256, 256, DType::bf16, 1, 8, 1, 2048, 1200, 1, Keys::clustered}, quick ? 4 : 100);
    report.section("the library: search and attention");
    for (const int dim : {64, 80, 128, 256}) {
        for (const DType type : {DType::f32, DType::f16, DType::bf16}) {
            if (!quick || (dim == 128 && type == DType::f16) || (dim == 80 && type == DType::f32)) {
                for (const int64_t n : {int64_t{5}, int64_t{700}}) {
                    check_search(report, {dim, dim, type, 2, dim == 64 ? 12 : 3, 1, n, static_cast<int>(n), 1, Keys::gaussian},
                                 seed++);
                }
                const int n = quick ? 700 : 1900;
                check_library_attention(report, {dim, dim, type, 2, 3, 1, n, n, 1, Keys::clustered}, seed++);
            }
        }
    }
    report.section("not finite, mask values");
    const Shape small{128, 128, DType::f16, 2, 3, 1, 512, 500, 1, Keys::clustered};
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
        for (const DType type : {DType::f16, DType::bf16, DType::f32}) {
            Shape shape = small;
            shape.type = type;
            check_not_finite(report, shape, bad, true);
            check_not_finite(report, shape, bad, false);
        }
    }
    for (const DType type : {DType::f16, DType::bf16, DType::f32}) {
        Shape shape = small;
        shape.type = type;
        check_query_not_finite(report, shape);
    }
    check_bias(report, small);
    check_room(report);
    report.section("controls");
    check_controls(report, small);
    return report.finish();
}

}  // namespace
}  // namespace louver::checks

int main(int argc, char ** argv) {
    try {
        const std::vector<louver::cuda::Device> devices = louver::cuda::devices();
        if (devices.empty() || !devices[0].supported()) {
            std::printf("no CUDA device of compute capability 8.0 or above\n");
            return 77;
        }
        std::printf("%s\n", devices[0].name.c_str());
        return louver::checks::run_all(argc > 1 && std::strcmp(argv[1], "--quick") == 0);
    } catch (const std::exception & error) {
        std::printf("%s\n", error.what());
        return 2;
    }
}
