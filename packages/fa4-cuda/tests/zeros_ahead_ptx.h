// What backward_zeros.cuh uses of ptx.cuh, on the host: threads are fibers of one, which run in an
// order that a seed decides, and the copy engine is as late as it may be.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace host {

struct Error {
  const char* what;
};

// A copy that has been asked for by a fiber, in a group of its own or others'.
struct Copy {
  int owner, group;
  bool is_addition;
  std::function<void()> run;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  std::function<void()> body;
  int group = 0;  // of copies
  bool done = false;
  bool has_seen = true;  // what others have told, by a fence of the copy engine
};

// All of a launch.
struct Machine {
  std::mt19937 chance;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Copy> copies;
  ucontext_t scheduler;
  int current = -1;
  long moves = 0;  // anything but waiting
  const char* error = nullptr;

  Fiber& fiber() { return *fibers[current]; }
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

  void start(std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    fiber->body = std::move(body);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(enter), 2,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
    fibers.push_back(std::move(fiber));
  }

  // Until all are done: one at a time, a while longer or shorter.
  void run() {
    long seen = -1;
    for (int idle = 0; idle < 5000; idle = moves == seen ? idle + 1 : 0, seen = moves) {
      size_t left = 0;
      for (const auto& fiber : fibers) left += !fiber->done;
      if (left == 0) break;
      current = static_cast<int>(chance() % fibers.size());
      for (int turns = 1 + static_cast<int>(chance() % 40); turns > 0 && !fiber().done; --turns) {
        swapcontext(&scheduler, &fiber().context);
        if (error != nullptr) throw Error{error};
      }
      if (!copies.empty() && chance() % 3 == 0) finish(chance() % copies.size());
    }
    for (const auto& fiber : fibers)
      if (!fiber->done) throw Error{"hangs"};
    if (!copies.empty()) throw Error{"ends with a copy under way"};
  }
};

inline Machine* machine;

}  // namespace host

namespace fa4::ptx {

using host::machine;

// Shared memory holds nothing but zeros.
inline void bulk_store(void* destination, uint32_t, uint32_t bytes) {
  machine->copies.push_back({machine->current, machine->fiber().group, false, [=] {
                               std::fill_n(static_cast<char*>(destination), bytes, '\0');
                             }});
}
inline void bulk_commit() { ++machine->fiber().group; }
// Its source is gone when it has been asked for: in the kernel that is waited for.
inline void bulk_reduce_add(float* destination, std::vector<float> values) {
  if (!machine->fiber().has_seen) throw host::Error{"adds to what the copy engine may not see"};
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
// Of groups that were committed.
inline void bulk_wait() {
  const int end = machine->fiber().group;
  while (are_under_way([=](const host::Copy& copy) { return copy.group < end; }))
    machine->yield();
}

inline int load_acquire(const int* address) {
  machine->yield();
  machine->fiber().has_seen = false;
  return *address;
}
inline void add_release(int* address, int value) {
  if (are_under_way([](const host::Copy& copy) { return !copy.is_addition; }))
    throw host::Error{"tells of what is still under way"};
  *address += value;
  ++machine->moves;
}
inline void fence_proxy_async_global() { machine->fiber().has_seen = true; }

}  // namespace fa4::ptx
