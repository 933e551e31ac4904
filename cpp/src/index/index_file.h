// Reading and writing index files, docs/format.md. A file holds keys and how they are grouped, never a bound: bounds are made
// anew from the keys, so that no file, however wrong, can break the guarantee.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "louver/index.h"
#include "louver/index_file.h"

namespace louver {

struct IndexContents {
    IndexOptions options;  // without n_threads
    DType type = DType::f32;
    int n_head_kv = 1;
    int dim = 1;
    int64_t n = 0;                              // positions
    std::vector<uint64_t> live;                 // [n_blocks_for(n)], no bit behind n
    std::vector<std::vector<std::byte>> keys;   // [n_head_kv] of n rows of row_bytes(type, dim)
    std::vector<std::vector<uint32_t>> groups;  // ball: [n_head_kv] of [n_subspaces][n], a number < n or 2^32 - 1
};

// Both throw IndexFileError.
// keys: [n_head_kv], for writing without a copy; contents.keys is not read then.
void write_index_file(const std::string & path, const IndexContents & contents, const std::vector<Rows> & keys);
IndexContents read_index_file(const std::string & path);

}  // namespace louver
