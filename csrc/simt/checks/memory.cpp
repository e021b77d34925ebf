#include "simt/checks/memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#include "simt/checks/counters.h"
#include "simt/checks/error.h"
#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

constexpr size_t kGranule = 2;  // bytes that share a cell

// The thread that made an access, and when. `epoch` is one number for launch, block and barrier interval.
struct AccessRecord {
  uint32_t epoch = 0;
  uint16_t warp_epoch = 0;
  uint16_t owner = 0;
};

// `owner` is kNoThread, a thread's index + 1, or a code for several threads, and may have the two flag bits.
constexpr uint16_t kNoThread = 0, kLanesOfWarp = 2048 /* + warp index */, kManyThreads = 4096, kManyBlocks = 4097;
constexpr uint16_t kOwnerMask = 0x1fff, kAtomic = 0x8000, kPendingCopy = 0x4000;

struct Cell {
  AccessRecord write, read;
};

uint16_t warp_of(uint16_t owner) { return owner >= kLanesOfWarp ? owner - kLanesOfWarp : (owner - 1) / kLanes; }

struct Buffer {
  const char* begin;
  const char* end;
  bool writable;
  Cell* cells;  // zeros until they are first used
  size_t cell_bytes;
  uint64_t loaded = 0, stored = 0;

  bool contains(const char* at) const { return at >= begin && at < end; }
};

std::mutex registration;
std::vector<Buffer> buffers;  // by address
Buffer* last_used = nullptr;
std::vector<Cell> shared_cells;

// The read-only segments of all loaded modules, where tables of constants are.
struct Constants {
  std::vector<std::pair<const char*, const char*>> ranges;

  Constants() {
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* self) {
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& part = module->dlpi_phdr[i];
            if (part.p_type != PT_LOAD || (part.p_flags & PF_W)) continue;
            const auto* begin = reinterpret_cast<const char*>(module->dlpi_addr + part.p_vaddr);
            static_cast<Constants*>(self)->ranges.emplace_back(begin, begin + part.p_memsz);
          }
          return 0;
        },
        this);
  }

  bool contain(const char* at) const {
    return std::any_of(ranges.begin(), ranges.end(), [at](const auto& p) { return at >= p.first && at < p.second; });
  }
};

Buffer* buffer_at(const char* at) {
  if (last_used != nullptr && last_used->contains(at)) return last_used;
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), at,
                                      [](const char* address, const Buffer& buffer) { return address < buffer.begin; });
  if (after == buffers.begin() || !std::prev(after)->contains(at)) return nullptr;
  return last_used = &*std::prev(after);
}

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates";
}

// The message names what is nearest to the address: the end of shared memory or an end of a buffer.
[[noreturn]] void fail_outside(const char* at, size_t bytes, Access access, const void* place) {
  const auto beyond_shared = at - (block().shared + block().shared_bytes);
  const Buffer* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (const Buffer& buffer : buffers) {
    const ptrdiff_t gap = at < buffer.begin ? buffer.begin - at : at - buffer.end;
    if (nearest == nullptr || gap < distance) nearest = &buffer, distance = gap;
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

// Whether an earlier access of another thread is not ordered before the one of `self`.
bool unordered(const AccessRecord& earlier, const Thread& self, const Block& now, bool shared) {
  const uint16_t owner = earlier.owner & kOwnerMask;
  if (owner == kNoThread) return false;
  if (earlier.epoch == now.epoch) {
    if (owner == self.linear + 1) return false;
    if (owner == kManyThreads || owner == kManyBlocks || warp_of(owner) != self.warp()) return true;
    return earlier.warp_epoch == static_cast<uint16_t>(now.warps[self.warp()].epoch);
  }
  if (shared) return false;
  if (owner == kManyBlocks) return earlier.epoch >= current_launch().first_epoch;
  return earlier.epoch < now.first_epoch && earlier.epoch >= current_launch().first_epoch;
}

AccessRecord record_of(const Thread& self, const Block& now, uint16_t flags = 0) {
  const auto warp_epoch = static_cast<uint16_t>(now.warps[self.warp()].epoch);
  return {now.epoch, warp_epoch, static_cast<uint16_t>((self.linear + 1) | flags)};
}

// Adds a read to the reads since the last write.
void add_read(AccessRecord& reads, const Thread& self, const Block& now, bool shared) {
  const AccessRecord own = record_of(self, now);
  const uint16_t owner = reads.owner & kOwnerMask;
  if (owner == kNoThread || (shared && reads.epoch != now.epoch) || reads.epoch < current_launch().first_epoch) {
    reads = own;
  } else if (owner == kManyBlocks || reads.epoch < now.first_epoch) {
    reads = {now.epoch, 0, kManyBlocks};
  } else if (reads.epoch != now.epoch) {
    reads = own;
  } else if (owner != kManyThreads && warp_of(owner) == self.warp() && reads.warp_epoch != own.warp_epoch) {
    reads = own;  // __syncwarp orders the earlier reads
  } else if (owner != own.owner) {
    const bool same_warp = owner != kManyThreads && warp_of(owner) == self.warp();
    reads = {now.epoch, own.warp_epoch, same_warp ? static_cast<uint16_t>(kLanesOfWarp + self.warp()) : kManyThreads};
  }
}

// The record after an atomic write. It stands for all atomic writes so far, because a plain access races with each.
AccessRecord after_atomic(const AccessRecord& before, const Thread& self, const Block& now, bool shared) {
  const AccessRecord own = record_of(self, now, kAtomic);
  const uint16_t owner = before.owner & kOwnerMask;
  if (!(before.owner & kAtomic) || before.epoch < (shared ? now.first_epoch : current_launch().first_epoch)) return own;
  if (owner == kManyBlocks || before.epoch < now.first_epoch) return {now.epoch, 0, kManyBlocks | kAtomic};
  if (before.epoch != now.epoch || owner == (own.owner & kOwnerMask)) return own;
  return {now.epoch, 0, kManyThreads | kAtomic};
}

std::string describe(const AccessRecord& record) {
  const uint16_t owner = record.owner & kOwnerMask;
  if (owner == kManyBlocks) return "threads of several blocks";
  std::string text;
  if (owner == kManyThreads) {
    text = "several threads";
  } else if (owner >= kLanesOfWarp) {
    text = "several lanes of warp " + std::to_string(owner - kLanesOfWarp);
  } else {
    text = "thread " + std::to_string(owner - 1);
  }
  return text + (record.epoch < block().first_epoch ? " of another block" : "");
}

[[noreturn]] void fail_race(const AccessRecord& earlier, bool read, Access access, bool shared, const void* place) {
  const char* memory = shared ? "shared" : "global";
  fail(place, "race in %s memory: %s what %s %s, and nothing orders the two", memory, verb(access),
       describe(earlier).c_str(), read ? "read" : "wrote");
}

void check_cells(Cell* cell, size_t count, Access access, bool shared, const void* place) {
  const Thread& self = thread();
  const Block& now = block();
  for (Cell* end = cell + count; cell != end; ++cell) {
    if (shared) {
      if (cell->write.epoch >= now.first_epoch && (cell->write.owner & kPendingCopy)) {
        fail(place, "%s shared memory while an asynchronous copy to it is unfinished", verb(access));
      }
      if (access != Access::write && (cell->write.owner == kNoThread || cell->write.epoch < now.first_epoch)) {
        fail(place, "%s shared memory that was never written", verb(access));
      }
    }
    const bool both_atomic = access == Access::atomic && (cell->write.owner & kAtomic);
    if (!both_atomic && unordered(cell->write, self, now, shared)) {
      fail_race(cell->write, false, access, shared, place);
    }
    if (access == Access::read) {
      add_read(cell->read, self, now, shared);
      continue;
    }
    if (unordered(cell->read, self, now, shared)) fail_race(cell->read, true, access, shared, place);
    cell->write = access == Access::atomic ? after_atomic(cell->write, self, now, shared) : record_of(self, now);
  }
}

size_t cell_count(size_t offset, size_t bytes) {
  return (offset + bytes + kGranule - 1) / kGranule - offset / kGranule;
}

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
    if (offset + bytes > block().shared_bytes) {
      fail_outside(block().shared + block().shared_bytes, bytes, access, place);
    }
    count_access(at, bytes, access != Access::read, true, place);
    check_cells(&shared_cells[offset / kGranule], cell_count(offset, bytes), access, true, place);
    return;
  }
  Buffer* buffer = buffer_at(at);
  if (buffer == nullptr) {
    static const Constants constants;
    if (access == Access::read && constants.contain(at)) return;
    fail_outside(at, bytes, access, place);
  }
  if (at + bytes > buffer->end) fail_outside(buffer->end, bytes, access, place);
  if (access != Access::read && !buffer->writable) fail(place, "%s a buffer that may only be read", verb(access));
  if (access != Access::write) buffer->loaded += bytes;
  if (access != Access::read) buffer->stored += bytes;
  count_access(at, bytes, access != Access::read, false, place);
  const auto offset = static_cast<size_t>(at - buffer->begin);
  check_cells(buffer->cells + offset / kGranule, cell_count(offset, bytes), access, false, place);
}

void reset_shared_shadow(size_t shared_bytes) { shared_cells.assign(cell_count(0, shared_bytes), Cell{}); }

void issue_copy(void* to, const void* place) {
  const auto offset = static_cast<size_t>(static_cast<char*>(to) - block().shared);
  if (offset + 16 > block().shared_bytes) fail_outside(static_cast<char*>(to) + 16, 16, Access::write, place);
  Cell* cells = &shared_cells[offset / kGranule];
  check_cells(cells, 16 / kGranule, Access::write, true, place);
  for (size_t i = 0; i < 16 / kGranule; ++i) cells[i].write.owner |= kPendingCopy;
}

void complete_copy(void* to) {
  const auto first = static_cast<size_t>(static_cast<char*>(to) - block().shared) / kGranule;
  for (size_t i = 0; i < 16 / kGranule; ++i) shared_cells[first + i].write = record_of(thread(), block());
}

void register_memory(uintptr_t address, size_t bytes, bool writable) {
  const std::lock_guard<std::mutex> lock(registration);
  const auto* begin = reinterpret_cast<const char*>(address);
  for (const Buffer& other : buffers) {
    if (begin < other.end && other.begin < begin + bytes) throw std::invalid_argument("registered memory overlaps");
  }
  const size_t cell_bytes = cell_count(0, bytes + kGranule) * sizeof(Cell);
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
