#include "simt/checks/memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#include "simt/checks/counters.h"
#include "simt/checks/fault.h"
#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

constexpr size_t kGranule = 2;  // bytes of a cell

// Who did something last, and when: `epoch` tells launch, block and barrier interval, all counted in one number.
struct Trace {
  uint32_t epoch = 0;
  uint16_t warp_epoch = 0;
  uint16_t who = 0;
};

// `who`: nobody, a thread + 1, or, of reads, several threads.
constexpr uint16_t kNobody = 0, kLanesOf = 2048 /* + warp */, kThreads = 4096, kBlocks = 4097;
constexpr uint16_t kWho = 0x1fff, kAtomic = 0x8000, kOnTheWay = 0x4000;

struct Cell {
  Trace write, read;
};

uint16_t warp_of(uint16_t who) { return who >= kLanesOf ? who - kLanesOf : (who - 1) / kLanes; }

struct Buffer {
  const char* begin;
  const char* end;
  bool writable;
  Cell* cells;  // zeros until touched
  size_t cell_bytes;
  uint64_t loaded = 0, stored = 0;

  bool holds(const char* at) const { return at >= begin && at < end; }
};

std::mutex registration;
std::vector<Buffer> buffers;  // by address
Buffer* last_used = nullptr;
std::vector<Cell> shared_cells;

// Where modules keep what nobody writes to: tables of constants are there.
struct Constants {
  std::vector<std::pair<const char*, const char*>> pieces;

  Constants() {
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* self) {
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& part = module->dlpi_phdr[i];
            if (part.p_type != PT_LOAD || (part.p_flags & PF_W)) continue;
            const auto* begin = reinterpret_cast<const char*>(module->dlpi_addr + part.p_vaddr);
            static_cast<Constants*>(self)->pieces.emplace_back(begin, begin + part.p_memsz);
          }
          return 0;
        },
        this);
  }

  bool hold(const char* at) const {
    return std::any_of(pieces.begin(), pieces.end(), [at](const auto& p) { return at >= p.first && at < p.second; });
  }
};

Buffer* buffer_at(const char* at) {
  if (last_used != nullptr && last_used->holds(at)) return last_used;
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), at,
                                      [](const char* address, const Buffer& buffer) { return address < buffer.begin; });
  if (after == buffers.begin() || !std::prev(after)->holds(at)) return nullptr;
  return last_used = &*std::prev(after);
}

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates";
}

// Says what the address is nearest to: the end of shared memory, or an end of a buffer.
[[noreturn]] void fail_outside(const char* at, size_t bytes, Access access, const void* place) {
  const auto beyond_shared = at - (block().shared + block().shared_bytes);
  const Buffer* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (const Buffer& buffer : buffers) {
    const ptrdiff_t apart = at < buffer.begin ? buffer.begin - at : at - buffer.end;
    if (nearest == nullptr || apart < distance) nearest = &buffer, distance = apart;
  }
  const bool near = beyond_shared >= 0 && beyond_shared < 1 << 16;
  if (block().shared_bytes > 0 && near && (nearest == nullptr || beyond_shared < distance)) {
    fail(place, "%s %zu bytes, %td beyond the end of the block's %zu bytes of shared memory", verb(access), bytes,
         beyond_shared, block().shared_bytes);
  }
  if (nearest == nullptr) fail(place, "%s %zu bytes at %p, and no memory is registered", verb(access), bytes, at);
  fail(place, "%s %zu bytes, %td %s a buffer of %td bytes", verb(access), bytes, distance,
       at < nearest->begin ? "before the beginning of" : "beyond the end of", nearest->end - nearest->begin);
}

// Whether an earlier access by others is not ordered before this one.
bool unordered(const Trace& earlier, const Thread& self, const Block& now, bool shared) {
  const uint16_t who = earlier.who & kWho;
  if (who == kNobody) return false;
  if (earlier.epoch == now.epoch) {
    if (who == self.linear + 1) return false;
    if (who == kThreads || who == kBlocks || warp_of(who) != self.warp()) return true;
    return earlier.warp_epoch == static_cast<uint16_t>(now.warps[self.warp()].epoch);
  }
  if (shared) return false;
  if (who == kBlocks) return earlier.epoch >= current_launch().first_epoch;
  return earlier.epoch < now.first_epoch && earlier.epoch >= current_launch().first_epoch;
}

Trace trace_of(const Thread& self, const Block& now, uint16_t flags = 0) {
  return {now.epoch, static_cast<uint16_t>(now.warps[self.warp()].epoch), static_cast<uint16_t>((self.linear + 1) | flags)};
}

// The reads since the last write, with one more.
void add_read(Trace& reads, const Thread& self, const Block& now, bool shared) {
  const Trace one = trace_of(self, now);
  const uint16_t who = reads.who & kWho;
  if (who == kNobody || (shared && reads.epoch != now.epoch) || reads.epoch < current_launch().first_epoch) {
    reads = one;
  } else if (who == kBlocks || reads.epoch < now.first_epoch) {
    reads = {now.epoch, 0, kBlocks};
  } else if (reads.epoch != now.epoch) {
    reads = one;
  } else if (who != kThreads && warp_of(who) == self.warp() && reads.warp_epoch != one.warp_epoch) {
    reads = one;  // __syncwarp orders those before
  } else if (who != one.who) {
    const bool same_warp = who != kThreads && warp_of(who) == self.warp();
    reads = {now.epoch, one.warp_epoch, same_warp ? static_cast<uint16_t>(kLanesOf + self.warp()) : kThreads};
  }
}

// The last write, an atomic one after those before: all are remembered, as plain accesses race with each.
Trace after_atomic(const Trace& before, const Thread& self, const Block& now, bool shared) {
  const Trace one = trace_of(self, now, kAtomic);
  const uint16_t who = before.who & kWho;
  if (!(before.who & kAtomic) || before.epoch < (shared ? now.first_epoch : current_launch().first_epoch)) return one;
  if (who == kBlocks || before.epoch < now.first_epoch) return {now.epoch, 0, kBlocks | kAtomic};
  if (before.epoch != now.epoch || who == (one.who & kWho)) return one;
  return {now.epoch, 0, kThreads | kAtomic};
}

std::string describe(const Trace& trace) {
  const uint16_t who = trace.who & kWho;
  if (who == kBlocks) return "threads of several blocks";
  std::string words;
  if (who == kThreads) {
    words = "several threads";
  } else if (who >= kLanesOf) {
    words = "several lanes of warp " + std::to_string(who - kLanesOf);
  } else {
    words = "thread " + std::to_string(who - 1);
  }
  return words + (trace.epoch < block().first_epoch ? " of another block" : "");
}

[[noreturn]] void fail_race(const Trace& earlier, bool read, Access access, bool shared, const void* place) {
  fail(place, "race in %s memory: %s what %s %s, and nothing orders the two", shared ? "shared" : "global", verb(access),
       describe(earlier).c_str(), read ? "read" : "wrote");
}

void check_cells(Cell* cell, size_t count, Access access, bool shared, const void* place) {
  const Thread& self = thread();
  const Block& now = block();
  for (Cell* end = cell + count; cell != end; ++cell) {
    if (shared) {
      if (cell->write.epoch >= now.first_epoch && (cell->write.who & kOnTheWay)) {
        fail(place, "%s shared memory while an asynchronous copy to it is on its way", verb(access));
      }
      if (access != Access::write && (cell->write.who == kNobody || cell->write.epoch < now.first_epoch)) {
        fail(place, "%s shared memory that nobody has written to", verb(access));
      }
    }
    const bool both_atomic = access == Access::atomic && (cell->write.who & kAtomic);
    if (!both_atomic && unordered(cell->write, self, now, shared)) {
      fail_race(cell->write, false, access, shared, place);
    }
    if (access == Access::read) {
      add_read(cell->read, self, now, shared);
      continue;
    }
    if (unordered(cell->read, self, now, shared)) fail_race(cell->read, true, access, shared, place);
    cell->write = access == Access::atomic ? after_atomic(cell->write, self, now, shared) : trace_of(self, now);
  }
}

size_t cells_of(size_t offset, size_t bytes) { return (offset + bytes + kGranule - 1) / kGranule - offset / kGranule; }

}  // namespace

bool is_shared(const void* address) {
  const auto* at = static_cast<const char*>(address);
  return at >= block().shared && at < block().shared + block().shared_bytes;
}

void check_access(const void* address, size_t bytes, Access access, const void* place) {
  const auto* at = static_cast<const char*>(address);
  const char* stack = thread().fiber.stack;
  if (static_cast<const char*>(__builtin_frame_address(0)) < stack) fail(place, "the thread's stack overflows");
  if (at >= stack && at < stack + kStackBytes) return;
  const auto* call = static_cast<const char*>(current_launch().call);
  if (access == Access::read && at >= call && at < call + current_launch().call_bytes) return;
  if (is_shared(at)) {
    const auto offset = static_cast<size_t>(at - block().shared);
    if (offset + bytes > block().shared_bytes) fail_outside(block().shared + block().shared_bytes, bytes, access, place);
    count_access(at, bytes, access != Access::read, true, place);
    check_cells(&shared_cells[offset / kGranule], cells_of(offset, bytes), access, true, place);
    return;
  }
  Buffer* buffer = buffer_at(at);
  if (buffer == nullptr) {
    static const Constants constants;
    if (access == Access::read && constants.hold(at)) return;
    fail_outside(at, bytes, access, place);
  }
  if (at + bytes > buffer->end) fail_outside(buffer->end, bytes, access, place);
  if (access != Access::read && !buffer->writable) fail(place, "%s a buffer that may only be read", verb(access));
  if (access != Access::write) buffer->loaded += bytes;
  if (access != Access::read) buffer->stored += bytes;
  count_access(at, bytes, access != Access::read, false, place);
  const auto offset = static_cast<size_t>(at - buffer->begin);
  check_cells(buffer->cells + offset / kGranule, cells_of(offset, bytes), access, false, place);
}

void begin_shadow(size_t shared_bytes) { shared_cells.assign(cells_of(0, shared_bytes), Cell{}); }

void issue_copy(void* to, const void* place) {
  const auto offset = static_cast<size_t>(static_cast<char*>(to) - block().shared);
  if (offset + 16 > block().shared_bytes) fail_outside(static_cast<char*>(to) + 16, 16, Access::write, place);
  Cell* cells = &shared_cells[offset / kGranule];
  check_cells(cells, 16 / kGranule, Access::write, true, place);
  for (size_t i = 0; i < 16 / kGranule; ++i) cells[i].write.who |= kOnTheWay;
}

void land_copy(void* to) {
  const auto first = static_cast<size_t>(static_cast<char*>(to) - block().shared) / kGranule;
  for (size_t i = 0; i < 16 / kGranule; ++i) shared_cells[first + i].write = trace_of(thread(), block());
}

void register_memory(uintptr_t address, size_t bytes, bool writable) {
  const std::lock_guard<std::mutex> lock(registration);
  const auto* begin = reinterpret_cast<const char*>(address);
  for (const Buffer& other : buffers) {
    if (begin < other.end && other.begin < begin + bytes) throw std::invalid_argument("registered memory overlaps");
  }
  const size_t cell_bytes = cells_of(0, bytes + kGranule) * sizeof(Cell);
  void* cells = mmap(nullptr, cell_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) throw std::bad_alloc();
  const Buffer added = {begin, begin + bytes, writable, static_cast<Cell*>(cells), cell_bytes};
  const auto place = std::upper_bound(buffers.begin(), buffers.end(), begin,
                                      [](const char* at, const Buffer& buffer) { return at < buffer.begin; });
  buffers.insert(place, added);
  last_used = nullptr;
}

void unregister_memory(uintptr_t address) {
  const std::lock_guard<std::mutex> lock(registration);
  const auto found = std::find_if(buffers.begin(), buffers.end(), [address](const Buffer& buffer) {
    return reinterpret_cast<uintptr_t>(buffer.begin) == address;
  });
  if (found == buffers.end()) throw std::invalid_argument("this memory is not registered");
  munmap(found->cells, found->cell_bytes);
  buffers.erase(found);
  last_used = nullptr;
}

std::vector<Traffic> traffic() {
  const std::lock_guard<std::mutex> lock(registration);
  std::vector<Traffic> found;
  for (const Buffer& each : buffers) {
    found.push_back({reinterpret_cast<uintptr_t>(each.begin), each.loaded, each.stored});
  }
  return found;
}

}  // namespace softprompt::simt
