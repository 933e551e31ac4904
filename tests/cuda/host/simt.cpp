#include "simt.h"

#include <ucontext.h>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace louver::simt {

Index thread_index;
Index block_index;
Index block_size;
Index grid_size;

namespace {

constexpr size_t kStack = 128 * 1024;

// Threads that arrive wait for the number of meetings to rise.
struct Meeting {
    uint64_t held = 0;
    unsigned arrived = 0;
};

struct Warp {
    Meeting meeting;
    Words brought[2][kWarp];
};

struct Fiber {
    std::unique_ptr<std::byte[]> stack = std::make_unique<std::byte[]>(kStack);
    ucontext_t start;
    jmp_buf place;
    bool begun = false;
    bool done = false;
    const uint64_t * waits_on = nullptr;  // until it is no longer what it was
    uint64_t while_it_is = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting meeting;
    bool any[2];
    bool all[2];
    std::vector<std::byte> memory;
    size_t current = 0;
    ucontext_t caller;
    jmp_buf scheduler;
    const std::function<void()> * kernel = nullptr;
    unsigned n_left = 0;  // threads that have not returned: nobody waits for those that have
};
Block block;

void open(Meeting & meeting) {
    meeting.arrived = 0;
    ++meeting.held;
}

void enter() {
    (*block.kernel)();
    block.fibers[block.current].done = true;
    if (--block.n_left > 0 && block.meeting.arrived == block.n_left) {
        open(block.meeting);
    }
    _longjmp(block.scheduler, 1);
}

void resume(size_t i) {
    block.current = i;
    thread_index.x = static_cast<unsigned>(i);
    Fiber & fiber = block.fibers[i];
    if (_setjmp(block.scheduler) != 0) {
        return;
    }
    if (fiber.begun) {
        _longjmp(fiber.place, 1);
    }
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
}

// The last of `n` opens the meeting.
void attend(Meeting & meeting, unsigned n) {
    const uint64_t number = meeting.held;
    if (++meeting.arrived == n) {
        open(meeting);
        return;
    }
    Fiber & fiber = block.fibers[block.current];
    fiber.waits_on = &meeting.held;
    fiber.while_it_is = number;
    if (_setjmp(fiber.place) == 0) {
        _longjmp(block.scheduler, 1);
    }
    fiber.waits_on = nullptr;
}

void run_block(unsigned threads) {
    for (Fiber & fiber : block.fibers) {
        fiber.begun = fiber.done = false;
        fiber.waits_on = nullptr;
    }
    for (Warp & warp : block.warps) {
        warp.meeting = {};
    }
    block.meeting = {};
    block.n_left = threads;
    while (block.n_left > 0) {
        bool moved = false;
        for (size_t turn = 0; turn < threads; ++turn) {
            // Every other block backwards: what depends on the order shows.
            const size_t i = block_index.x % 2 == 0 ? turn : threads - 1 - turn;
            const Fiber & fiber = block.fibers[i];
            if (!fiber.done && (fiber.waits_on == nullptr || *fiber.waits_on != fiber.while_it_is)) {
                resume(i);
                moved = true;
            }
        }
        if (!moved) {
            std::fprintf(stderr, "simt: %u threads of a block wait for others that never come\n", block.n_left);
            std::abort();
        }
    }
}

}  // namespace

std::byte * dynamic_memory() { return block.memory.data(); }

void run(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()> & kernel) {
    if (block.fibers.size() < threads) {
        block.fibers = std::vector<Fiber>(threads);
    }
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.kernel = &kernel;
    grid_size = grid;
    block_size = {threads, 1, 1};
    for (block_index.z = 0; block_index.z < grid.z; ++block_index.z) {
        for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
            for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
                // Never what the block before left: 0xff is a NaN.
                block.memory.assign(shared_bytes, std::byte{0xff});
                run_block(threads);
            }
        }
    }
}

Votes meet_block(bool value) {
    const size_t which = block.meeting.held % 2;
    if (block.meeting.arrived == 0) {
        block.any[which] = false;
        block.all[which] = true;
    }
    block.any[which] = block.any[which] || value;
    block.all[which] = block.all[which] && value;
    attend(block.meeting, block.n_left);
    return {block.any[which], block.all[which]};
}

const Words * meet_warp(const void * brought, size_t bytes) {
    Warp & warp = block.warps[thread_index.x / kWarp];
    Words * all = warp.brought[warp.meeting.held % 2];
    std::memcpy(all[lane()], brought, bytes);
    attend(warp.meeting, kWarp);
    return all;
}

}  // namespace louver::simt
