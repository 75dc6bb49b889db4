#define SPARSAE_ISA sparsae_avx512
#define SPARSAE_LANES 16
#include "kernels.hpp"

const sparsae::Kernels& sparsae::kernels_avx512() {
    static const Kernels kernels{"avx512", SPARSAE_ISA::forward, SPARSAE_ISA::backward, SPARSAE_ISA::mlp_forward,
                                 SPARSAE_ISA::mlp_backward, SPARSAE_ISA::attention_forward,
                                 SPARSAE_ISA::attention_backward, SPARSAE_ISA::losses, SPARSAE_ISA::token,
                                 SPARSAE_ISA::multiply_add, SPARSAE_ISA::triad};
    return kernels;
}
