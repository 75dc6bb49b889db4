#define SPARSAE_ISA sparsae_avx2
#define SPARSAE_LANES 8
#include "kernels.hpp"

const sparsae::Kernels& sparsae::kernels_avx2() {
    static const Kernels kernels{"avx2", SPARSAE_ISA::forward, SPARSAE_ISA::backward, SPARSAE_ISA::mlp_forward,
                                 SPARSAE_ISA::mlp_backward, SPARSAE_ISA::attention_forward,
                                 SPARSAE_ISA::attention_backward, SPARSAE_ISA::losses, SPARSAE_ISA::token,
                                 SPARSAE_ISA::multiply_add, SPARSAE_ISA::triad};
    return kernels;
}
