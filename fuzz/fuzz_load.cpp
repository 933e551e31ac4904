// A file made of the input, or a valid one with damage, optionally with its checksums repaired: it loads as an index that answers
// right, or it is refused with an IndexFileError.
#include <fcntl.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash/xxhash.h>

#include <fstream>
#include <iterator>
#include <string>

#include "judge.h"
#include "louver/index_file.h"
#include "program.h"

using namespace louver;

namespace {

using Bytes = std::vector<char>;

std::string scratch_path() { return "/dev/shm/louver-fuzz-load-" + std::to_string(getpid()); }

Bytes read_file(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(in), {});
}

void write_file(const std::string & path, const Bytes & bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

Bytes valid_file(fuzz::Choices & in) {
    IndexOptions options;
    options.kind = static_cast<IndexKind>(in.byte() % 2);
    const int dim = 1 + in.byte() % 8;
    const int n_head_kv = 1 + in.byte() % 2;
    options.ball.n_subspaces = 1 + in.byte() % dim;
    const int n = in.byte();
    const std::vector<float> x = fuzz::numbers(in.byte() % fuzz::kFlavours, n * n_head_kv, dim, in.byte(), false);
    Index index(options, DType::f32, n_head_kv, dim);
    index.append({reinterpret_cast<const std::byte *>(x.data()), DType::f32, n_head_kv, n, dim, 4 * n * dim, 4 * dim, 4});
    index.save(scratch_path());
    return read_file(scratch_path());
}

uint64_t word_at(const Bytes & file, size_t offset) {
    uint64_t word;
    std::memcpy(&word, file.data() + offset, sizeof(word));
    return word;
}

void put(Bytes & file, size_t offset, uint64_t word) { std::memcpy(file.data() + offset, &word, sizeof(word)); }

// docs/format.md: sections from 64 on, three times offset, bytes, checksum; the header's checksum at 248.
void repair_checksums(Bytes & file) {
    if (file.size() < 256) {
        return;
    }
    for (size_t at = 64; at < 136; at += 24) {
        const uint64_t offset = word_at(file, at);
        const uint64_t bytes = word_at(file, at + 8);
        if (offset <= file.size() && bytes <= file.size() - offset) {
            put(file, at + 16, XXH3_64bits(file.data() + offset, bytes));
        }
    }
    put(file, 248, XXH3_64bits(file.data(), 248));
}

void damage(Bytes & file, fuzz::Choices & in) {
    for (int times = in.byte() % 4; times >= 0 && !file.empty(); --times) {
        const size_t where = in.byte() % 2 ? static_cast<size_t>(in.below(256)) : static_cast<size_t>(in.below(65536));
        switch (in.byte() % 5) {
            case 0: file[where % file.size()] ^= static_cast<char>(1 << in.byte() % 8); break;
            case 1: file[where % file.size()] = static_cast<char>(in.byte()); break;
            case 2: file.resize(where % file.size()); break;
            case 3: file.insert(file.end(), in.byte(), static_cast<char>(in.byte())); break;
            default: repair_checksums(file); break;
        }
    }
}

// The keys of a loaded index are what it says they are: it must find them.
void search(const Index & index, uint8_t seed) {
    fuzz::Model model;
    model.n_head_kv = index.n_head_kv();
    model.dim = index.dim();
    model.keys.resize(static_cast<size_t>(model.n_head_kv));
    for (int64_t i = 0; i < index.n_positions(); ++i) {
        const std::vector<float> key = index.key(i);
        for (int h = 0; h < model.n_head_kv; ++h) {
            auto & keys = model.keys[static_cast<size_t>(h)];
            keys.insert(keys.end(), key.begin() + h * model.dim, key.begin() + (h + 1) * model.dim);
        }
        model.live.push_back(index.is_live(i));
    }
    const std::vector<float> query = fuzz::numbers(seed % fuzz::kFlavours, model.n_head_kv, model.dim, seed, true);
    std::vector<double> tau(static_cast<size_t>(model.n_head_kv), 0.0);
    for (size_t h = 0; h < tau.size() && model.n() > 0; ++h) {
        const int i = seed % model.n();
        const float * q = query.data() + h * static_cast<size_t>(model.dim);
        tau[h] = model.finite(static_cast<int>(h), i)
                     ? static_cast<double>(fuzz::score(q, model.key(static_cast<int>(h), i), model.dim).value)
                     : 0.0;
    }
    fuzz::judge_search(model, query, tau, index.search(query, tau));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    fuzz::Choices in(data, size);
    const uint8_t mode = in.byte();
    const uint8_t seed = in.byte();
    Bytes file;
    if (mode % 8 == 0) {
        file.assign(reinterpret_cast<const char *>(data), reinterpret_cast<const char *>(data) + size);
    } else {
        file = valid_file(in);
        damage(file, in);
        if (mode % 2 != 0) {
            repair_checksums(file);
        }
    }
    write_file(scratch_path(), file);
    try {
        const Index index = Index::load(scratch_path(), 1);
        search(index, seed);
    } catch (const IndexFileError &) {
        // Refused, as it should be.
    }
    unlink(scratch_path().c_str());
    return 0;
}
