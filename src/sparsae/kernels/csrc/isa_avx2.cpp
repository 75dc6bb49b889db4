#define SPARSAE_ISA sparsae_avx2
#define SPARSAE_LANES 8
#include "kernels.hpp"

const sparsae::Kernels& sparsae::kernels_avx2() {
    static const Kernels kernels{"avx2", SPARSAE_ISA::forward, SPARSAE_ISA::backward};
    return kernels;
}
