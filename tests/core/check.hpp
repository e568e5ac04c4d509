// What the C++ tests share: checks that end the program and name the line that failed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>

#define CHECK(condition) crosscoder::check((condition), #condition, __FILE__, __LINE__)

namespace crosscoder {

inline void check(bool holds, const char* what, const char* file, int line) {
    if (!holds) {
        std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
        std::exit(1);
    }
}

template <class Error>
bool throws(const std::function<void()>& function) {
    try {
        function();
    } catch (const Error&) {
        return true;
    }
    return false;
}

}  // namespace crosscoder
