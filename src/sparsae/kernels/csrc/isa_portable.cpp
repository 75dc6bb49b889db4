#define SPARSAE_ISA sparsae_portable
#define SPARSAE_LANES 4
#include "kernels.hpp"

const sparsae::Kernels& sparsae::kernels_portable() {
    static const Kernels kernels{"portable", SPARSAE_ISA::forward, SPARSAE_ISA::backward};
    return kernels;
}
