// Run a loop's iterations on several cores without ever waiting for a core that has not come.
//
// OpenMP's team waits at each loop's end for all of its threads, also for one that the kernel has given no time yet: on
// cores shared with another process that is a scheduler's slice (8-16 ms) where the work was 20 us. Here the caller takes
// iterations itself from the start; helpers take some if and when they run, and the caller waits only for iterations
// that a helper has begun.
#pragma once

namespace kvasir {

typedef void (*Iteration)(void* context, int i);

void run_iterations(int n, int threads, Iteration run, void* context);

// body(i) for 0 <= i < n, begun in that order, on up to `threads` cores.
template <class F> void parallel_for(int n, int threads, F&& body) {
    if (n <= 1 || threads <= 1) {
        for (int i = 0; i < n; i++) body(i);
        return;
    }
    run_iterations(n, threads, [](void* context, int i) { (*static_cast<F*>(context))(i); }, &body);
}

// The same in steps of `step` rows: body(first, last) for 0 <= first < last <= n.
template <class F> void parallel_rows(int n, int step, int threads, F&& body) {
    parallel_for((n + step - 1) / step, threads, [&](int i) { body(i * step, (i + 1) * step < n ? (i + 1) * step : n); });
}

}  // namespace kvasir
