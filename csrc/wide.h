// DBK_WIDE marks a function that is loops over one row. It is compiled twice, for what the library
// is compiled for and for AVX-512, and the processor chooses when the library is loaded.
//
// Conversions and exponentials take about half the time (Zen 5, gcc 12). Sums have other lanes, so
// their last bits depend on the processor.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define DBK_WIDE __attribute__((target_clones("arch=x86-64-v4", "default")))
#else
#define DBK_WIDE
#endif
