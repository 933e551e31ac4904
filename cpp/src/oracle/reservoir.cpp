#include "oracle/reservoir.h"

namespace louver {

Reservoir::Reservoir(int size, uint64_t seed) : size_(static_cast<size_t>(size)), random_(seed) {}

void Reservoir::append(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        insert(first + i);
    }
}

void Reservoir::insert(int64_t position) {
    ++n_live_;
    const uint64_t gone = gone_inside_ + gone_outside_;
    if (gone > 0) {
        // It takes the place of one of the removed, each as likely.
        if (draw(gone) < gone_inside_) {
            --gone_inside_;
            sample_.push_back(position);
            slot_[position] = sample_.size() - 1;
        } else {
            --gone_outside_;
        }
    } else if (sample_.size() < size_) {
        sample_.push_back(position);
        slot_[position] = sample_.size() - 1;
    } else if (const uint64_t at = draw(n_live_); at < size_) {
        put(static_cast<size_t>(at), position);
    }
}

void Reservoir::put(size_t slot, int64_t position) {
    slot_.erase(sample_[slot]);
    sample_[slot] = position;
    slot_[position] = slot;
}

void Reservoir::remove(int64_t position) {
    --n_live_;
    const auto found = slot_.find(position);
    if (found == slot_.end()) {
        ++gone_outside_;
        return;
    }
    ++gone_inside_;
    const size_t slot = found->second;
    slot_.erase(found);
    if (slot + 1 < sample_.size()) {
        sample_[slot] = sample_.back();
        slot_[sample_[slot]] = slot;
    }
    sample_.pop_back();
}

void Reservoir::restart(const std::vector<uint64_t> & live, int64_t n) {
    n_live_ = gone_inside_ = gone_outside_ = 0;
    sample_.clear();
    slot_.clear();
    for (int64_t position = 0; position < n; ++position) {
        if ((live[static_cast<size_t>(position / 64)] >> position % 64 & 1) != 0) {
            insert(position);
        }
    }
}

uint64_t Reservoir::draw(uint64_t n) {
    // Numbers from the last, incomplete run of n are drawn again; std::uniform_int_distribution differs between libraries.
    const uint64_t end = UINT64_MAX - UINT64_MAX % n;
    for (;;) {
        const uint64_t x = random_();
        if (x < end) {
            return x % n;
        }
    }
}

}  // namespace louver
