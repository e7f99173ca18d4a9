// What the kernels need of the standard library.
#pragma once

#if !defined(__GNUC__)
#error "the kernels are written in the vector extensions of GCC and clang"
#endif

#if defined(__x86_64__) || defined(__i386__)
#define SKNODE_X86
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(SKNODE_X86)
#include <immintrin.h>
#endif

#include "problem.h"
#include "threads.h"
