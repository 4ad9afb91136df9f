// What backward_upkeep.cuh uses of ptx.cuh, on the host: lanes are fibers of one thread, which run
// in an order that a seed decides, and the copy engine is as late as it may be.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "element.h"

struct float2 {
  float x, y;
};
struct int4 {
  int x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace host {

struct Error {
  const char* what;
};

// A copy that has been asked for: by a fiber that may wait for its group, or for a barrier.
struct Copy {
  int owner, group;
  bool is_addition;
  std::function<void()> run;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  std::function<void()> body;
  int lane, warp, block;
  int meets = -1;  // the meeting of its warp that it waits for
  int group = 0;   // of copies
  bool done = false;
};

struct Barrier {
  int arrivals = 0, pending = 0, bytes = 0, phase = 0;
};

struct Warp {
  int there = 0, generation = 0;
  uint32_t values[2][32];
};

// All of a launch.
struct Machine {
  std::mt19937 chance;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<std::vector<char>> shared;  // of each thread block
  std::vector<std::map<uint32_t, Barrier>> barriers;
  std::vector<Copy> copies;
  ucontext_t scheduler;
  int current = -1;
  long moves = 0;  // anything but waiting
  const char* error = nullptr;
  std::function<bool(const int*)> may_tell_while_adding;

  Fiber& fiber() { return *fibers[current]; }
  Warp& warp() { return warps[fiber().warp]; }
  char* memory(uint32_t address, uint32_t bytes) { return place(fiber().block, address, bytes); }
  char* place(int block, uint32_t address, uint32_t bytes) {
    if (address % std::min(bytes, 16u) != 0) throw Error{"is not aligned"};
    if (address + bytes > shared[block].size()) throw Error{"leaves its memory"};
    return &shared[block][address];
  }
  void yield() { swapcontext(&fiber().context, &scheduler); }

  void finish(size_t i) {
    const Copy copy = copies[i];
    copies.erase(copies.begin() + i);
    copy.run();
    ++moves;
  }

  static void enter(unsigned low, unsigned high) {
    auto* machine = reinterpret_cast<Machine*>(uintptr_t{high} << 32 | low);
    try {
      machine->fiber().body();
    } catch (const Error& error) {
      machine->error = error.what;  // nothing is thrown from one stack to another
    }
    machine->fiber().done = true;
    ++machine->moves;
    machine->yield();
  }

  void start(int block, int warp, int lane, std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = block;
    fiber->warp = warp;
    fiber->lane = lane;
    fiber->body = std::move(body);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(enter), 2,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
    fibers.push_back(std::move(fiber));
  }

  // Until all are done: a warp at a time, a while longer or shorter.
  void run() {
    long seen = -1;
    int idle = 0;
    while (true) {
      int left = 0;
      for (const auto& fiber : fibers) left += !fiber->done;
      if (left == 0) break;
      const int warp = static_cast<int>(chance() % warps.size());
      for (int turns = 1 + static_cast<int>(chance() % 40); turns > 0; --turns) {
        const size_t first = chance() % fibers.size();  // lanes have no order either
        for (size_t i = 0; i < fibers.size(); ++i) {
          const size_t at = (first + i) % fibers.size();
          const Fiber& next = *fibers[at];
          if (next.warp != warp || next.done || next.meets == warps[warp].generation) continue;
          if (chance() % 4 == 0) continue;
          current = static_cast<int>(at);
          swapcontext(&scheduler, &fiber().context);
          if (error != nullptr) throw Error{error};
        }
      }
      if (!copies.empty() && chance() % 3 == 0) finish(chance() % copies.size());
      idle = moves == seen ? idle + 1 : 0;
      seen = moves;
      if (idle > 2000) throw Error{"hangs"};
    }
    if (!copies.empty()) throw Error{"ends with a copy under way"};
  }
};

inline Machine* machine;

// Waits for all lanes, and gives what each has brought.
inline const uint32_t* meet(uint32_t value) {
  Warp& warp = machine->warp();
  const int generation = warp.generation;
  warp.values[generation & 1][machine->fiber().lane] = value;
  if (++warp.there == 32) {
    warp.there = 0;
    ++warp.generation;
    ++machine->moves;
  }
  machine->fiber().meets = generation;
  while (warp.generation == generation) machine->yield();
  return warp.values[generation & 1];
}

}  // namespace host

inline void __syncwarp() { host::meet(0); }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
  return host::meet(value)[host::machine->fiber().lane ^ mask];
}
inline bool __any_sync(unsigned, bool value) {
  const uint32_t* const values = host::meet(value);
  for (int i = 0; i < 32; ++i)
    if (values[i] != 0) return true;
  return false;
}

namespace fa4::ptx {

using host::machine;

inline int lane_id() { return machine->fiber().lane; }

// Now and then the other lanes go first.
inline void hesitate() {
  if (machine->chance() % 8 == 0) machine->yield();
}

inline int load_shared_int(uint32_t address) {
  hesitate();
  int value;
  std::memcpy(&value, machine->memory(address, 4), 4);
  return value;
}
inline void store_shared_int(uint32_t address, int value) {
  std::memcpy(machine->memory(address, 4), &value, 4);
}
inline void store_shared(uint32_t address, int4 value) {
  hesitate();
  std::memcpy(machine->memory(address, 16), &value, 16);
}
inline float2 load_shared_float2(uint32_t address) {
  float2 value;
  std::memcpy(&value, machine->memory(address, 8), 8);
  return value;
}

inline host::Barrier& barrier_at(int block, uint32_t address) {
  return machine->barriers[block].at(address);
}
inline void settle(host::Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
  ++machine->moves;
}
inline void mbarrier_init(uint32_t address, int arrivals) {
  machine->barriers[machine->fiber().block][address] = {arrivals, arrivals, 0, 0};
}
inline void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  host::Barrier& barrier = barrier_at(machine->fiber().block, address);
  barrier.bytes += static_cast<int>(bytes);
  if (--barrier.pending < 0) throw host::Error{"arrives where nobody is expected"};
  settle(barrier);
}
inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  const int block = machine->fiber().block;
  while (barrier_at(block, address).phase == static_cast<int>(parity)) machine->yield();
}

inline void bulk_load_last(uint32_t destination, const void* source, uint32_t bytes,
                           uint32_t barrier) {
  const int block = machine->fiber().block;
  char* const place = machine->memory(destination, bytes);
  machine->copies.push_back({-1, 0, false, [=] {
                               std::memcpy(place, source, bytes);
                               host::Barrier& told = barrier_at(block, barrier);
                               told.bytes -= static_cast<int>(bytes);
                               settle(told);
                             }});
}
inline void bulk_store(void* destination, uint32_t source, uint32_t bytes) {
  const char* const place = machine->memory(source, bytes);
  machine->copies.push_back({machine->current, machine->fiber().group, false,
                             [=] { std::memcpy(destination, place, bytes); }});
}
inline void bulk_commit() { ++machine->fiber().group; }
// Its source is gone when it has been asked for: in the kernel that is waited for.
inline void bulk_reduce_add(float* destination, std::vector<float> values) {
  machine->copies.push_back({machine->current, machine->fiber().group, true, [=] {
                               for (size_t i = 0; i < values.size(); ++i)
                                 destination[i] += values[i];
                             }});
  bulk_commit();
}
inline bool are_under_way(const std::function<bool(const host::Copy&)>& counts) {
  for (const host::Copy& copy : machine->copies)
    if (copy.owner == machine->current && counts(copy)) return true;
  return false;
}
// Of groups that were committed, all but the last `left`.
inline void wait_for_groups(int left) {
  const int end = machine->fiber().group - left;
  while (are_under_way([=](const host::Copy& copy) { return copy.group < end; }))
    machine->yield();
}
inline void bulk_wait() { wait_for_groups(0); }
inline void bulk_wait_but_one() { wait_for_groups(1); }

inline int load_acquire(const int* address) {
  machine->yield();
  return *address;
}
inline void add_relaxed(int* address, int value) {
  const bool adding_too = !machine->may_tell_while_adding(address);
  if (are_under_way([=](const host::Copy& copy) { return adding_too || !copy.is_addition; }))
    throw host::Error{"tells of what is still under way"};
  *address += value;
  ++machine->moves;
}
inline void fence_mbarrier_init() {}
inline void fence_gpu() {}
inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}

inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <Element kElement>
uint32_t pack(float low, float high) {
  static_assert(kElement == Element::kBfloat16);
  return static_cast<uint32_t>(rounded(high)) << 16 | rounded(low);
}
template <Element kElement>
uint32_t max_nan(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, uint32_t y) {
    return (x & 0x7FFF) > 0x7F80 || (y & 0x7FFF) > 0x7F80 ? 0x7FFFu : x;
  };
  return half(a & 0xFFFF, b & 0xFFFF) | half(a >> 16, b >> 16) << 16;
}

}  // namespace fa4::ptx
