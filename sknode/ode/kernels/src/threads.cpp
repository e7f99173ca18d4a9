// Threads for the kernels.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace sknode {
namespace {

#if defined(__linux__)
// The entry point of GNU's OpenMP for a parallel region; LLVM's has it, too.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<Parallel> parallel{nullptr};
std::atomic<pid_t> owner{0};
#endif

}  // namespace

bool share_threads(bool on) {
#if defined(__linux__)
    parallel = nullptr;
    if (!on) return false;
    // only what torch has loaded already: another team would be no help
    void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "GOMP_parallel");
    owner = getpid();
    parallel = reinterpret_cast<Parallel>(symbol);
    return symbol != nullptr;
#else
    (void)on;
    return false;
#endif
}

void run_on_threads(int threads, int useful, void (*work)(void*), void* data) {
    if (std::min(threads, useful) <= 1) return work(data);
#if defined(__linux__)
    // A child made by fork has none of the team's threads, and would wait for them. The
    // team is asked for as a whole: those left out would end, to be made anew by torch.
    const Parallel region = parallel;
    if (region && getpid() == owner)
        return region(work, data, static_cast<unsigned>(threads), 0);
#endif
    threads = std::min(threads, useful);
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    for (int i = 1; i < threads; ++i) {
        try {
            others.emplace_back(work, data);
        } catch (const std::exception&) {
            break;  // fewer threads then
        }
    }
    work(data);
    for (std::thread& thread : others) thread.join();
}

}  // namespace sknode
