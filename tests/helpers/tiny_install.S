/* An installation disc of one sector (El Torito, no emulation), for tests of whole machines.
 *
 * The firmware has loaded it to 0x7c00 and the system that it installs behind it, to 0x7e00. That is
 * written to the first sectors of the first disk; "INSTALLED" goes to the first serial line, and the
 * machine is switched off (q35: control at 0x604).
 */
        .code16
        .globl _start
_start: cli
        xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        ljmp $0, $1f
1:      sti
        mov $0x4300, %ax
        mov $0x80, %dl
        mov $packet, %si
        int $0x13
        mov $failed, %si
        jc 2f
        mov $hello, %si
2:      lodsb
        test %al, %al
        jz 4f
        mov %al, %ah
        mov $0x3fd, %dx
3:      in %dx, %al
        test $0x20, %al
        jz 3b
        mov %ah, %al
        mov $0x3f8, %dx
        out %al, %dx
        jmp 2b
4:      mov $0x3fd, %dx                 /* until all of it has left */
        in %dx, %al
        test $0x40, %al
        jz 4b
        mov $0x604, %dx
        mov $0x2000, %ax
        out %ax, %dx
5:      hlt
        jmp 5b
hello:  .asciz "INSTALLED\r\n"
failed: .asciz "NOT INSTALLED\r\n"
        .balign 4
packet: .byte 16, 0
        .word 3, 0x7e00, 0
        .quad 0
        .org 512
