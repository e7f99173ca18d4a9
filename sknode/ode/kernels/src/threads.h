// Threads for the kernels: those of torch where they can be had. Threads of torch's that
// have just worked stay busy for some milliseconds, waiting for more, and further ones
// would have to share the processors with them.
#pragma once

namespace sknode {

// Work on as many threads as there can be, at most so many, the calling one among them,
// and on no fewer than are useful. `work` must not throw, and may be called more often
// than is useful.
void run_on_threads(int threads, int useful, void (*work)(void*), void* data);

// Use torch's threads, in this process, or do not; return whether they were found.
// Otherwise threads live for one call.
bool share_threads(bool on);

}  // namespace sknode
