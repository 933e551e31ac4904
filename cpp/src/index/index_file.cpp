#include "index/index_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <new>

#define XXH_INLINE_ALL
#include <xxhash/xxhash.h>

#include "index/atomic_file.h"
#include "index/ball_index.h"

namespace louver {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

constexpr char kMagic[8] = {'L', 'O', 'U', 'V', 'E', 'R', 'I', 'X'};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kAlignment = 64;
constexpr size_t kIoBytes = size_t{1} << 24;  // read or written at a time

enum SectionId { kLive, kKeys, kGroups, kSections };

// docs/format.md. No padding: every field lies at a multiple of its size.
struct Section {
    uint64_t offset;
    uint64_t bytes;
    uint64_t checksum;
};
struct Header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes;
    uint64_t file_bytes;
    uint64_t n;
    uint32_t n_head_kv;
    uint32_t dim;
    uint8_t type;
    uint8_t kind;
    uint8_t grouping;
    uint8_t enclosure;
    uint32_t n_subspaces;
    uint32_t group_size;
    uint32_t merge_at;
    uint64_t seed;
    Section sections[kSections];
    uint8_t reserved[112];
    uint64_t checksum;  // of all before
};
static_assert(sizeof(Header) == 256 && offsetof(Header, checksum) == 248);

constexpr uint64_t aligned(uint64_t offset) { return (offset + kAlignment - 1) / kAlignment * kAlignment; }

uint64_t checksum_of(const Header & header) { return XXH3_64bits(&header, offsetof(Header, checksum)); }

// Where the sections of such an index lie. All factors are bounded: no product overflows.
std::array<Section, kSections> layout(const Header & h) {
    const uint64_t blocks = (h.n + kBlockCells - 1) / kBlockCells;
    const uint64_t bytes[kSections] = {
        blocks * sizeof(uint64_t),
        h.n_head_kv * h.n * row_bytes(static_cast<DType>(h.type), h.dim),
        h.kind == static_cast<uint8_t>(IndexKind::ball) ? h.n_head_kv * h.n * h.n_subspaces * sizeof(uint32_t) : 0,
    };
    std::array<Section, kSections> sections{};
    uint64_t offset = sizeof(Header);
    for (size_t i = 0; i < kSections; ++i) {
        sections[i].offset = aligned(offset);
        sections[i].bytes = bytes[i];
        offset = sections[i].offset + bytes[i];
    }
    return sections;
}

class Hash {
  public:
    Hash() { XXH3_64bits_reset(&state_); }
    void add(const void * data, size_t bytes) { XXH3_64bits_update(&state_, data, bytes); }
    uint64_t value() const { return XXH3_64bits_digest(&state_); }

  private:
    XXH3_state_t state_;
};

// Writes one section piece by piece.
class SectionWriter {
  public:
    SectionWriter(AtomicFile & file, Section & section) : file_(file), section_(section), next_(section.offset) {}
    ~SectionWriter() { section_.checksum = hash_.value(); }

    void write(const void * data, size_t bytes) {
        hash_.add(data, bytes);
        file_.write(data, bytes, next_);
        next_ += bytes;
    }

    // Rows that need not lie side by side.
    void write(const Rows & rows, int64_t n) {
        const size_t row = row_bytes(rows.type, rows.dim);
        const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(kIoBytes / row));
        std::vector<std::byte> buffer;
        for (int64_t first = 0; first < n; first += most) {
            const int64_t count = std::min(most, n - first);
            if (rows.stride == static_cast<int64_t>(row)) {
                write(rows.row(first), static_cast<size_t>(count) * row);
                continue;
            }
            buffer.resize(static_cast<size_t>(count) * row);
            for (int64_t i = 0; i < count; ++i) {
                std::memcpy(buffer.data() + static_cast<size_t>(i) * row, rows.row(first + i), row);
            }
            write(buffer.data(), buffer.size());
        }
    }

  private:
    AtomicFile & file_;
    Section & section_;
    uint64_t next_;
    Hash hash_;
};

class Reader {
  public:
    explicit Reader(const std::string & path) : path_(path) {
        file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // opening a pipe must not wait for a writer
        if (file_ < 0) {
            fail(IndexFileError::Reason::system, std::string("cannot be opened: ") + std::strerror(errno));
        }
        struct stat found;
        if (fstat(file_, &found) != 0 || !S_ISREG(found.st_mode)) {
            close(file_);
            fail(IndexFileError::Reason::system, "cannot be read: it is no ordinary file");
        }
        size_ = static_cast<uint64_t>(found.st_size);
    }
    ~Reader() { close(file_); }
    Reader(const Reader &) = delete;
    Reader & operator=(const Reader &) = delete;

    uint64_t size() const { return size_; }

    [[noreturn]] void fail(IndexFileError::Reason reason, const std::string & what) const {
        throw IndexFileError(reason, path_ + " " + what);
    }
    void require(bool holds, const std::string & what) const {
        if (!holds) {
            fail(IndexFileError::Reason::corrupt, "is corrupt: " + what);
        }
    }

    void read(void * to, size_t bytes, uint64_t offset) const {
        char * next = static_cast<char *>(to);
        while (bytes > 0) {
            const ssize_t got = pread(file_, next, std::min(bytes, kIoBytes), static_cast<off_t>(offset));
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got < 0) {
                fail(IndexFileError::Reason::system, std::string("cannot be read: ") + std::strerror(errno));
            }
            if (got == 0) {
                fail(IndexFileError::Reason::truncated, "ends early, at byte " + std::to_string(offset));
            }
            next += got;
            bytes -= static_cast<size_t>(got);
            offset += static_cast<uint64_t>(got);
        }
    }

  private:
    std::string path_;
    int file_;
    uint64_t size_;
};

Header read_header(const Reader & reader) {
    Header h{};
    reader.read(&h, std::min<uint64_t>(reader.size(), sizeof(h)), 0);
    const size_t magic = std::min<uint64_t>(reader.size(), sizeof(kMagic));
    if (reader.size() == 0 || std::memcmp(h.magic, kMagic, magic) != 0) {
        reader.fail(IndexFileError::Reason::not_index, "is not an index file: it does not begin with LOUVERIX");
    }
    if (reader.size() < sizeof(h)) {
        reader.fail(IndexFileError::Reason::truncated, "ends early: it has " + std::to_string(reader.size()) +
                                                           " bytes, the header alone has " + std::to_string(sizeof(h)));
    }
    if (h.version > kVersion) {
        reader.fail(IndexFileError::Reason::version,
                    "is of version " + std::to_string(h.version) + ", this library reads version " + std::to_string(kVersion));
    }
    reader.require(h.checksum == checksum_of(h), "the header's checksum is wrong");
    reader.require(h.version == kVersion, "there is no version 0");
    reader.require(h.header_bytes == sizeof(h), "header_bytes is " + std::to_string(h.header_bytes));
    reader.require(h.n <= 0x7fffffff, "n is " + std::to_string(h.n));
    reader.require(h.n_head_kv >= 1 && h.n_head_kv <= kMaxHeads, "n_head_kv is " + std::to_string(h.n_head_kv));
    reader.require(h.dim >= 1 && h.dim <= kMaxDim, "dim is " + std::to_string(h.dim));
    reader.require(h.type <= static_cast<uint8_t>(DType::bf16), "type is " + std::to_string(h.type));
    reader.require(h.kind <= static_cast<uint8_t>(IndexKind::ball), "kind is " + std::to_string(h.kind));
    reader.require(h.grouping <= static_cast<uint8_t>(Grouping::kmeans), "grouping is " + std::to_string(h.grouping));
    reader.require(h.enclosure <= static_cast<uint8_t>(Enclosure::box), "enclosure is " + std::to_string(h.enclosure));
    const bool ball = h.kind == static_cast<uint8_t>(IndexKind::ball);
    reader.require(h.n_subspaces <= 0x7fffffff && (!ball || (h.n_subspaces >= 1 && h.n_subspaces <= h.dim)),
                   "n_subspaces is " + std::to_string(h.n_subspaces));
    reader.require(h.group_size >= 1 && h.group_size <= 0x7fffffff, "group_size is " + std::to_string(h.group_size));
    reader.require(h.merge_at >= 1 && h.merge_at <= 0x7fffffff, "merge_at is " + std::to_string(h.merge_at));
    reader.require(std::all_of(std::begin(h.reserved), std::end(h.reserved), [](uint8_t byte) { return byte == 0; }),
                   "a reserved byte is set");
    const auto sections = layout(h);
    for (size_t i = 0; i < kSections; ++i) {
        reader.require(h.sections[i].offset == sections[i].offset && h.sections[i].bytes == sections[i].bytes,
                       "section " + std::to_string(i) + " is not where the header's sizes put it");
    }
    const uint64_t wanted = sections[kGroups].offset + sections[kGroups].bytes;
    reader.require(h.file_bytes == wanted, "file_bytes is " + std::to_string(h.file_bytes));
    if (reader.size() < wanted) {
        reader.fail(IndexFileError::Reason::truncated,
                    "ends early: it has " + std::to_string(reader.size()) + " of " + std::to_string(wanted) + " bytes");
    }
    reader.require(reader.size() == wanted, "bytes follow its end");
    return h;
}

// Reads one section piece by piece; finish() compares its checksum.
class SectionReader {
  public:
    SectionReader(const Reader & reader, const Header & header, SectionId id)
        : reader_(reader), section_(header.sections[id]), next_(section_.offset), id_(id) {}

    void read(void * to, size_t bytes) {
        for (size_t done = 0; done < bytes; done += kIoBytes) {
            const size_t count = std::min(kIoBytes, bytes - done);
            reader_.read(static_cast<char *>(to) + done, count, next_);
            hash_.add(static_cast<char *>(to) + done, count);
            next_ += count;
        }
    }

    void finish() const {
        reader_.require(hash_.value() == section_.checksum, "the checksum of section " + std::to_string(id_) + " is wrong");
    }

  private:
    const Reader & reader_;
    Section section_;
    uint64_t next_;
    SectionId id_;
    Hash hash_;
};

// Between the sections lie zeros: no bit of a file goes unchecked.
void require_padding(const Reader & reader, const Header & h) {
    uint64_t end = sizeof(Header);
    for (const Section & section : h.sections) {
        char padding[kAlignment] = {};
        reader.read(padding, section.offset - end, end);
        reader.require(std::all_of(padding, padding + kAlignment, [](char byte) { return byte == 0; }),
                       "there is something between two sections");
        end = section.offset + section.bytes;
    }
}

// What is allocated is no more than the file has.
IndexContents read_contents(const Reader & reader, const Header & h) {
    IndexContents contents;
    contents.options.kind = static_cast<IndexKind>(h.kind);
    contents.options.ball = {static_cast<int>(h.n_subspaces),   static_cast<int>(h.group_size),
                             static_cast<Grouping>(h.grouping), static_cast<Enclosure>(h.enclosure),
                             static_cast<int>(h.merge_at),      h.seed};
    contents.type = static_cast<DType>(h.type);
    contents.n_head_kv = static_cast<int>(h.n_head_kv);
    contents.dim = static_cast<int>(h.dim);
    contents.n = static_cast<int64_t>(h.n);

    SectionReader live(reader, h, kLive);
    contents.live.resize(h.sections[kLive].bytes / sizeof(uint64_t));
    live.read(contents.live.data(), h.sections[kLive].bytes);
    live.finish();
    reader.require(h.n % kBlockCells == 0 || contents.live.back() >> h.n % kBlockCells == 0, "a key behind the last one is live");

    SectionReader keys(reader, h, kKeys);
    for (uint32_t head = 0; head < h.n_head_kv; ++head) {
        contents.keys.emplace_back(h.n * row_bytes(contents.type, h.dim));
        keys.read(contents.keys.back().data(), contents.keys.back().size());
    }
    keys.finish();

    SectionReader groups(reader, h, kGroups);
    for (uint32_t head = 0; head < h.n_head_kv && contents.options.kind == IndexKind::ball; ++head) {
        contents.groups.emplace_back(h.n * h.n_subspaces);
        groups.read(contents.groups.back().data(), contents.groups.back().size() * sizeof(uint32_t));
        for (const uint32_t group : contents.groups.back()) {
            reader.require(group < h.n || group == BallIndex::kNoGroup, "a group's number is " + std::to_string(group));
        }
    }
    groups.finish();
    return contents;
}

}  // namespace

void write_index_file(const std::string & path, const IndexContents & contents, const std::vector<Rows> & keys) {
    const BallOptions & ball = contents.options.ball;
    Header h{};
    std::copy(std::begin(kMagic), std::end(kMagic), h.magic);
    h.version = kVersion;
    h.header_bytes = sizeof(h);
    h.n = static_cast<uint64_t>(contents.n);
    h.n_head_kv = static_cast<uint32_t>(contents.n_head_kv);
    h.dim = static_cast<uint32_t>(contents.dim);
    h.type = static_cast<uint8_t>(contents.type);
    h.kind = static_cast<uint8_t>(contents.options.kind);
    h.grouping = static_cast<uint8_t>(ball.grouping);
    h.enclosure = static_cast<uint8_t>(ball.enclosure);
    h.n_subspaces = static_cast<uint32_t>(ball.n_subspaces);
    h.group_size = static_cast<uint32_t>(ball.group_size);
    h.merge_at = static_cast<uint32_t>(ball.merge_at);
    h.seed = ball.seed;
    const auto sections = layout(h);
    std::copy(sections.begin(), sections.end(), h.sections);
    h.file_bytes = sections[kGroups].offset + sections[kGroups].bytes;

    AtomicFile file(path);
    SectionWriter(file, h.sections[kLive]).write(contents.live.data(), contents.live.size() * sizeof(uint64_t));
    {
        SectionWriter section(file, h.sections[kKeys]);
        for (const Rows & head : keys) {
            section.write(head, contents.n);
        }
    }
    {
        SectionWriter section(file, h.sections[kGroups]);
        for (const std::vector<uint32_t> & head : contents.groups) {
            section.write(head.data(), head.size() * sizeof(uint32_t));
        }
    }
    // The last bytes may be padding that nothing was written to.
    uint64_t end = sizeof(h);
    for (const Section & section : h.sections) {
        const char zeros[kAlignment] = {};
        file.write(zeros, section.offset - end, end);
        end = section.offset + section.bytes;
    }
    h.checksum = checksum_of(h);
    file.write(&h, sizeof(h), 0);
    file.commit();
}

IndexContents read_index_file(const std::string & path) {
    const Reader reader(path);
    const Header h = read_header(reader);
    require_padding(reader, h);

    // A sparse file can be longer than any memory.
    try {
        return read_contents(reader, h);
    } catch (const std::bad_alloc &) {
        reader.fail(IndexFileError::Reason::system,
                    "cannot be read: its " + std::to_string(h.file_bytes) + " bytes do not fit into memory");
    }
}

}  // namespace louver
