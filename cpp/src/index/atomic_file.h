// A file that is written beside its name and moved there whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace louver {

// What is written goes to a temporary file in the same folder, "<name>.<process>-<number>.tmp"; commit() moves it over the name.
// A process that is killed leaves what was there before, and maybe the temporary file; an exception leaves nothing. A symbolic
// link is written through. All throw IndexFileError of reason system.
class AtomicFile {
  public:
    explicit AtomicFile(const std::string & path);
    ~AtomicFile();
    AtomicFile(const AtomicFile &) = delete;
    AtomicFile & operator=(const AtomicFile &) = delete;

    void write(const void * data, size_t bytes, uint64_t offset);

    // On the disk, then under its name.
    void commit();

  private:
    [[noreturn]] void fail(const char * what) const;

    std::string given_;  // for messages
    std::string path_;
    std::string temporary_;
    int file_ = -1;
};

}  // namespace louver
