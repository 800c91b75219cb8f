// The helpers behind parallel_for: one loop at a time, iterations claimed by compare-and-swap.
#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace kvasir {
namespace {

constexpr int kMaxHelpers = 255;
constexpr auto kSpin = std::chrono::microseconds(50);  // bridges the Python between two kernels of a step

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until `is_true` or kSpin is over; whether it came true.
template <class F> bool spin(F&& is_true) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; i++) {
            if (is_true()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
}

// state: [loop number 24 bits][helpers allowed 8 bits][iterations not yet claimed 32 bits]. The loop's description is
// written before its state is published and stays until `finished` reaches n, so whoever has claimed an iteration may
// read it: the loop cannot end before that iteration does.
class Pool {
  public:
    void run(int n, int threads, Iteration iteration, void* context) {
        std::unique_lock<std::mutex> owner(one_loop_, std::try_to_lock);
        if (!owner) {  // another thread's loop has the helpers
            for (int i = 0; i < n; i++) iteration(context, i);
            return;
        }
        const int helpers = std::min({threads - 1, n - 1, kMaxHelpers});
        while (num_helpers_ < helpers) std::thread(&Pool::help, this, num_helpers_++).detach();
        n_ = n;
        iteration_ = iteration;
        context_ = context;
        finished_.store(0, std::memory_order_relaxed);
        state_.store((uint64_t)(++loop_ & 0xffffff) << 40 | (uint64_t)helpers << 32 | (uint32_t)n);
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        while (claim_one(-1)) {
        }
        auto is_over = [&] { return finished_.load(std::memory_order_acquire) == n; };
        if (spin(is_over)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        over_.wait(lock, is_over);
    }

  private:
    // Claim and run the next iteration, if there is one for this helper (-1: the caller).
    bool claim_one(int helper) {
        uint64_t state = state_.load(std::memory_order_acquire);
        do {
            if (!has_work(state, helper)) return false;
        } while (!state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel));
        const int n = n_;
        iteration_(context_, n - (int)(uint32_t)state);
        if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == n && helper >= 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            over_.notify_all();
        }
        return true;
    }

    static bool has_work(uint64_t state, int helper) {
        return (uint32_t)state && helper < (int)(state >> 32 & 0xff);
    }

    void help(int helper) {
        for (;;) {
            while (claim_one(helper)) {
            }
            auto has_work_now = [&] { return has_work(state_.load(), helper); };
            if (spin(has_work_now)) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_++;
            wake_.wait(lock, has_work_now);
            sleepers_--;
        }
    }

    std::mutex one_loop_, mutex_;
    std::condition_variable wake_, over_;
    std::atomic<uint64_t> state_{0};
    std::atomic<int> finished_{0}, sleepers_{0};
    uint32_t loop_ = 0;
    int num_helpers_ = 0, n_ = 0;
    Iteration iteration_ = nullptr;
    void* context_ = nullptr;
};

Pool* pool = nullptr;  // never destroyed: helpers outlive static destructors
std::once_flag once;

void make_pool() { pool = new Pool; }

}  // namespace

void run_iterations(int n, int threads, Iteration run, void* context) {
    std::call_once(once, [] {
        make_pool();
        pthread_atfork(nullptr, nullptr, make_pool);  // a fork's child has none of the helpers
    });
    pool->run(n, threads, run, context);
}

}  // namespace kvasir
