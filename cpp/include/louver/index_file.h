// What can be wrong with an index file.
#pragma once

#include <stdexcept>
#include <string>

namespace louver {

class IndexFileError : public std::runtime_error {
  public:
    enum class Reason {
        system,     // the operating system refused: it cannot be opened, read, written, moved
        not_index,  // something else than an index file
        version,    // written by a later version
        truncated,  // it ends early
        corrupt,    // a checksum or a field is wrong
    };
    IndexFileError(Reason reason, const std::string & message) : std::runtime_error(message), reason_(reason) {}
    Reason reason() const { return reason_; }

  private:
    Reason reason_;
};

}  // namespace louver
