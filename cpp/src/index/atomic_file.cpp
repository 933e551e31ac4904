#include "index/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "louver/index_file.h"

namespace louver {
namespace {

std::string unique_name(const std::string & path) {
    static std::atomic<unsigned> count{0};
    return path + "." + std::to_string(getpid()) + "-" + std::to_string(count.fetch_add(1)) + ".tmp";
}

// What a symbolic link leads to, there or not. A loop stays a link.
std::string followed(const std::string & path) {
    constexpr int kMostLinks = 40;
    std::filesystem::path target = path;
    std::error_code error;
    for (int i = 0; i < kMostLinks && std::filesystem::is_symlink(target, error); ++i) {
        target = target.parent_path() / std::filesystem::read_symlink(target, error);
    }
    return target.string();
}

}  // namespace

AtomicFile::AtomicFile(const std::string & path) : given_(path), path_(followed(path)) {
    struct stat old;
    const bool replaces = stat(path.c_str(), &old) == 0;
    if (!replaces && errno != ENOENT) {
        fail("cannot be written");
    }
    if (replaces && !S_ISREG(old.st_mode)) {
        errno = S_ISDIR(old.st_mode) ? EISDIR : EINVAL;
        fail("cannot be replaced, it is no ordinary file");
    }
    do {
        temporary_ = unique_name(path_);
        file_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC,
                     replaces ? 0600 : 0666);  // no wider than the old one
    } while (file_ < 0 && errno == EEXIST);
    if (file_ < 0) {
        temporary_.clear();
        fail("cannot be written");
    }
    if (replaces) {
        static_cast<void>(fchmod(file_, old.st_mode & 07777));  // a courtesy
    }
}

AtomicFile::~AtomicFile() {
    if (file_ >= 0) {
        close(file_);
    }
    if (!temporary_.empty()) {
        unlink(temporary_.c_str());
    }
}

void AtomicFile::fail(const char * what) const {
    throw IndexFileError(IndexFileError::Reason::system, given_ + " " + what + ": " + std::strerror(errno));
}

void AtomicFile::write(const void * data, size_t bytes, uint64_t offset) {
    constexpr size_t kMost = size_t{1} << 30;  // a call writes less than 2^31
    const char * next = static_cast<const char *>(data);
    while (bytes > 0) {
        const ssize_t written = pwrite(file_, next, bytes < kMost ? bytes : kMost, static_cast<off_t>(offset));
        if (written < 0 && errno == EINTR) {
            continue;
        }
        if (written < 0) {
            fail("cannot be written");
        }
        next += written;
        bytes -= static_cast<size_t>(written);
        offset += static_cast<uint64_t>(written);
    }
}

void AtomicFile::commit() {
    if (fsync(file_) != 0) {
        fail("cannot be written to the disk");
    }
    const int file = file_;
    file_ = -1;
    if (close(file) != 0 && errno != EINTR) {
        fail("cannot be closed");
    }
    if (std::rename(temporary_.c_str(), path_.c_str()) != 0) {
        fail("cannot be replaced");
    }
    temporary_.clear();
    // The name, too, has to survive a loss of power. A folder that cannot be opened for reading is no reason to fail.
    const std::string folder = std::filesystem::path(path_).parent_path().string();
    const int handle = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (handle >= 0) {
        fsync(handle);
        close(handle);
    }
}

}  // namespace louver
